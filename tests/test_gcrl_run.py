"""A loaded run: encoding, likelihood, sampling and completion of images, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from limits import HANG

import gcrl
from gcrl import checkpoint
from gcrl.palette import save_palette, to_tokens
from gcrl.run import Run, build_model, load, resolve_device


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run.tiny_run(tmp_path_factory.mktemp("run"))


def test_the_package_offers_the_entry_points() -> None:
    assert gcrl.load is load
    assert gcrl.Run is Run
    assert gcrl.Config is type(tiny_run.CONFIG)
    assert isinstance(gcrl.__version__, str)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gcrl.nothing


def test_importing_the_package_does_not_wait_for_torch() -> None:
    code = "import sys, gcrl; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG)


def test_load_takes_the_average_of_the_weights_unless_told_otherwise(run: Run) -> None:
    assert run.step == 30
    plain = load(run.folder, device="cpu", ema=False)
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * plain.model.get_parameter(name))
    assert not run.model.training


@pytest.mark.parametrize("method", ["encode", "log_prob"])
def test_an_image_gives_the_same_alone_and_among_others(run: Run, method: str) -> None:
    images = tiny_run.noise_images(11)  # batches of 4, 4 and 3
    together = getattr(run, method)(images)
    alone = torch.cat([getattr(run, method)(image[None]) for image in images])
    assert together.dtype == torch.float32
    assert together.std(dim=0).min() > 1e-2  # the images do differ
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_log_prob_sums_the_pixels_log_probabilities(run: Run) -> None:
    images = tiny_run.noise_images(5)
    tokens = to_tokens(torch.from_numpy(images), tiny_run.PALETTE)
    with torch.no_grad():
        each = run.model.logits(tokens).log_softmax(-1).gather(-1, tokens[..., None])
    torch.testing.assert_close(run.log_prob(images), each.sum((1, 2, 3)))


def test_encode_is_the_mean_of_the_encoding(run: Run) -> None:
    images = tiny_run.noise_images(5)
    tokens = to_tokens(torch.from_numpy(images), tiny_run.PALETTE)
    with torch.no_grad():
        expected = run.model.encode(tokens).mean((1, 2))
    assert expected.shape == (5, 16)
    torch.testing.assert_close(run.encode(images), expected)


def test_arrays_tensors_and_views_of_them_are_alike(run: Run) -> None:
    images = tiny_run.noise_images(3)
    expected = run.encode(images)
    read_only = images.copy()
    read_only.setflags(write=False)
    for same in (torch.from_numpy(images), read_only, images[::-1].copy()[::-1]):
        assert torch.equal(run.encode(same), expected)


def test_larger_images_are_averaged_to_the_grid(run: Run) -> None:
    images = tiny_run.noise_images(3)
    doubled = images.repeat(2, axis=1).repeat(2, axis=2)
    assert torch.equal(run.log_prob(doubled), run.log_prob(images))
    assert run.encode(tiny_run.noise_images(2, side=7)).shape == (2, 16)


@pytest.mark.parametrize("method", ["encode", "log_prob", "complete", "quantize"])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[0]], TypeError, "images: expected an array or a tensor, got list"),
        (np.zeros((2, 4, 4, 3)), TypeError, "images: expected uint8, 0 to 255, got float64"),
        (torch.zeros(2, 4, 4, 3), TypeError, "images: expected uint8, 0 to 255, got torch.float32"),
        (
            torch.zeros(2, 4, 4, 3, dtype=torch.bfloat16),
            TypeError,
            "images: expected uint8, 0 to 255, got torch.bfloat16",
        ),
        (
            np.zeros((4, 4, 3), np.uint8),
            ValueError,
            r"images: expected \[N, height, width, 3\], got \[4, 4, 3\]",
        ),
        (
            np.zeros((2, 3, 4, 4), np.uint8),
            ValueError,
            r"images: expected \[N, height, width, 3\], got \[2, 3, 4, 4\]",
        ),
        (
            np.zeros((0, 4, 4, 3), np.uint8),
            ValueError,
            r"images: expected \[N, height, width, 3\], got \[0, 4, 4, 3\]",
        ),
    ],
)
def test_other_images_are_refused(
    run: Run, method: str, images: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(run, method)(images)


def test_sample_repeats_from_its_seed(run: Run) -> None:
    first, again, other = run.sample(6, seed=3), run.sample(6, seed=3), run.sample(6, seed=4)
    assert first.shape == (6, 4, 4, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:2], first[4:])  # the second batch is not the first again
    colors = {tuple(color) for color in first.flatten(0, 2).tolist()}
    assert colors <= {tuple(color) for color in tiny_run.PALETTE.int().tolist()}


def test_sample_without_a_seed_follows_the_global_generator(run: Run) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = run.sample(4), run.sample(4)
        torch.manual_seed(0)
        assert torch.equal(run.sample(4), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_sample_refuses_other_counts(run: Run, n: object) -> None:
    with pytest.raises(ValueError, match=f"n: expected a positive integer, got {n}"):
        run.sample(n)


@pytest.mark.parametrize(("height", "kept"), [(4, 2), (5, 3)])
def test_complete_keeps_the_upper_half(tmp_path: Path, height: int, kept: int) -> None:
    run = tiny_run.tiny_run(tmp_path, tiny_run.with_settings("model", grid=(height, 4)))
    images = tiny_run.noise_images(6, side=5)
    seen, drawn = run.quantize(images), run.complete(images, seed=1)
    assert drawn.shape == (6, height, 4, 3)
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn[:, :kept], seen[:, :kept])
    assert not torch.equal(drawn[:, kept], seen[:, kept])
    assert torch.equal(drawn, run.complete(images, seed=1))
    assert not torch.equal(drawn, run.complete(images, seed=2))


def test_quantize_gives_the_nearest_colours(run: Run) -> None:
    images = tiny_run.noise_images(3)
    distances = torch.cdist(torch.from_numpy(images).flatten(0, 2).double(), run.palette.double())
    expected = run.palette[distances.argmin(1)].to(torch.uint8).view(3, 4, 4, 3)
    assert torch.equal(run.quantize(images), expected)


def test_the_untrained_network_follows_from_the_seed_alone(run: Run) -> None:
    before = torch.get_rng_state()
    first = build_model(run.config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    for name, parameter in run.untrained().model.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name))
    assert run.untrained().step == 0
    other = build_model(tiny_run.with_settings("runtime", seed=1))
    assert not torch.equal(other.embed.weight, first.embed.weight)
    torch.manual_seed(run.config.runtime.seed)
    assert torch.equal(gcrl.model.GCRL(run.config.model).embed.weight, first.embed.weight)


def test_devices_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: 'cuda' was asked for, but PyTorch sees 0 CUDA"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device: 'cuda:2' was asked for, but PyTorch sees 2"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "meta", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device: expected .*, got '{name}'"):
        resolve_device(name)


@pytest.mark.parametrize("missing", ["config.json", "palette.npy"])
def test_load_names_what_a_folder_lacks(tmp_path: Path, missing: str) -> None:
    tiny_run.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"is not the folder of a run: it has no {missing}"):
        load(tmp_path)


def test_load_without_a_checkpoint(tmp_path: Path) -> None:
    tiny_run.save(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        load(tmp_path)


def test_load_refuses_a_palette_of_another_size(tmp_path: Path) -> None:
    tiny_run.save(tmp_path)
    save_palette(tmp_path / "palette.npy", tiny_run.PALETTE[:5])
    with pytest.raises(ValueError, match=r"palette.npy has 5 colours, the model in config.json 8"):
        load(tmp_path)


def test_load_refuses_weights_of_another_model(tmp_path: Path) -> None:
    tiny_run.save(tmp_path)
    wider = replace(tiny_run.CONFIG, model=replace(tiny_run.CONFIG.model, width=32))
    (tmp_path / "config.json").write_text(wider.to_json())
    with pytest.raises(checkpoint.CheckpointError, match="beside it: width was 16, now 32"):
        load(tmp_path, device="cpu")
