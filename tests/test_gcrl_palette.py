"""Palettes: read in any unit, written whole, fitted, and their tokens."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gcrl import palette as palettes

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "openai_palette_512.npy"
COLORS = np.array([[0, 0, 0], [255, 128, 0], [51, 102, 255]])


@pytest.mark.parametrize(
    "stored",
    [
        COLORS,
        COLORS.astype(np.uint8),
        COLORS.astype(np.float32),
        COLORS / 255,
        COLORS / 127.5 - 1,
        (COLORS / 127.5 - 1).astype(np.float32),
    ],
)
def test_units_are_told_by_the_range(tmp_path: Path, stored: np.ndarray) -> None:
    np.save(tmp_path / "palette.npy", stored)
    loaded = palettes.load_palette(tmp_path / "palette.npy")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, torch.tensor(COLORS).float(), rtol=0, atol=1e-4)


def test_small_integers_are_not_rescaled(tmp_path: Path) -> None:
    np.save(tmp_path / "palette.npy", np.array([[0, 0, 0], [1, 1, 1]]))
    assert palettes.load_palette(tmp_path / "palette.npy").tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_palette_that_was_saved_is_not_rescaled(tmp_path: Path) -> None:
    dark = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.25]])
    palettes.save_palette(tmp_path / "palette.npy", dark)
    assert torch.equal(palettes.load_palette(tmp_path / "palette.npy", rescale=False), dark)


def test_the_palette_of_igpt() -> None:
    if not REAL.exists():
        pytest.skip("needs ../shared/data/openai_palette_512.npy")
    palette = palettes.load_palette(REAL)
    assert palette.shape == (512, 3)
    stored = torch.from_numpy(np.load(REAL)).double()
    torch.testing.assert_close(palette.double(), (stored + 1) * 127.5, rtol=0, atol=1e-4)
    tokens = torch.arange(512)
    assert torch.equal(palettes.to_tokens(palette, palette), tokens)
    assert torch.equal(palettes.to_tokens(palettes.to_rgb(tokens, palette), palette), tokens)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((4, 4)), r"expected \[K, 3\] with at least 2 colours, got \[4, 4\]"),
        (np.zeros((1, 3)), r"expected \[K, 3\] with at least 2 colours, got \[1, 3\]"),
        (np.zeros(3), r"expected \[K, 3\] with at least 2 colours, got \[3\]"),
        (np.array([[0, 0, np.nan], [1, 1, 1]]), "expected finite numbers"),
        (COLORS * 2, "got 0 to 510"),
        (COLORS - 1.0, "got -1.0 to 254.0"),
        (np.array([[-2.0, 0, 0], [1, 1, 1]]), "got -2.0 to 1.0"),
        (np.array([[-1, 0, 0], [1, 1, 1]]), "got -1 to 1"),
        (COLORS.astype(str), "expected an array of numbers"),
        (COLORS.astype(object), "cannot be read as an .npy file: .*Python objects"),
    ],
)
def test_a_wrong_palette_is_named(tmp_path: Path, stored: np.ndarray, message: str) -> None:
    np.save(tmp_path / "palette.npy", stored)
    with pytest.raises(ValueError, match=f"palette.npy: .*{message}"):
        palettes.load_palette(tmp_path / "palette.npy")


def test_a_damaged_palette_is_named(tmp_path: Path) -> None:
    path = tmp_path / "palette.npy"
    with pytest.raises(ValueError, match=r"palette.npy: cannot be read"):
        palettes.load_palette(path)
    np.save(path, COLORS)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"palette.npy: cannot be read"):
        palettes.load_palette(path)
    np.savez(tmp_path / "several.npy.npz", COLORS)
    with pytest.raises(ValueError, match=r"expected an array of numbers .*, got several arrays"):
        palettes.load_palette(tmp_path / "several.npy.npz")


def test_a_saved_palette_comes_back(tmp_path: Path) -> None:
    palette = torch.rand(16, 3) * 200 + 20
    path = tmp_path / "run" / "palette.npy"
    palettes.save_palette(path, palette)
    assert torch.equal(palettes.load_palette(path), palette)
    assert np.load(path).dtype == np.float32
    assert os.listdir(path.parent) == ["palette.npy"]


def test_a_failed_save_keeps_the_palette(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "palette.npy"
    first, second = torch.full((2, 3), 9.0), torch.full((2, 3), 7.0)
    palettes.save_palette(path, first)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        palettes.save_palette(path, second)
    assert torch.equal(palettes.load_palette(path), first)
    assert os.listdir(tmp_path) == ["palette.npy"]


def test_a_fitted_palette_finds_the_colours_of_the_images() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[10, 200, 30], [250, 250, 240], [60, 60, 200], [128, 0, 0]])
    tokens = torch.randint(4, (50, 8, 8), generator=generator)
    noise = torch.randint(-3, 4, (50, 8, 8, 3), generator=generator)
    images = (truth[tokens] + noise).clamp(0, 255).to(torch.uint8)
    palette = palettes.fit(images, 4)
    assert palette.shape == (4, 3)
    assert palette.dtype == torch.float32
    distance = torch.cdist(truth.float(), palette)
    assert distance.min(dim=1).values.max() < 3
    assert torch.equal(palettes.fit(images.numpy(), 4), palette)
    assert torch.equal(distance.argmin(dim=1)[tokens], palettes.to_tokens(images, palette))


def test_a_fit_looks_at_no_more_pixels_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(20, 16, 16, 3), dtype=np.uint8)
    seen: list[torch.Tensor] = []

    def keep(pixels: torch.Tensor, colors: int, **_: object) -> torch.Tensor:
        seen.append(pixels)
        return pixels[:colors].float()

    monkeypatch.setattr(palettes, "fit_palette", keep)
    monkeypatch.setattr(palettes, "FIT_PIXELS", 1000)
    for seed in (0, 0, 1):
        palettes.fit(images, 8, seed=seed)
    assert [len(pixels) for pixels in seen] == [1000] * 3
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert len(seen[0].unique(dim=0)) > 850  # from all over the 5,120 pixels
    palettes.fit(images[:3], 8)
    assert torch.equal(seen[3], torch.from_numpy(images[:3]).reshape(-1, 3))


def test_tokens_and_colours_are_inverse() -> None:
    palette = torch.tensor(COLORS).float()
    tokens = torch.randint(3, (2, 4, 5))
    images = palettes.to_rgb(tokens, palette)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 4, 5, 3)
    assert torch.equal(palettes.to_tokens(images, palette), tokens)
    near = images.float() + torch.rand(images.shape) * 20
    assert torch.equal(palettes.to_tokens(near, palette), tokens)


def test_colours_are_rounded_into_bytes() -> None:
    palette = torch.tensor([[-0.4, 0.6, 254.6], [255.3, 1.4, 127.5]])
    assert palettes.to_rgb(torch.tensor([0, 1]), palette).tolist() == [[0, 1, 255], [255, 1, 128]]


def test_a_palette_is_no_larger_than_its_file(tmp_path: Path) -> None:
    """A header may announce any number of colours: 12 TB here."""
    np.save(tmp_path / "palette.npy", COLORS.astype(np.float32))
    content = (tmp_path / "palette.npy").read_bytes()
    shape = b"(3, 3), }" + b" " * 10
    assert shape in content
    (tmp_path / "palette.npy").write_bytes(content.replace(shape, b"(%d, 3), }" % 10**12, 1)[:200])
    with pytest.raises(ValueError, match=r"palette\.npy: cannot be read as an \.npy file: mmap"):
        palettes.load_palette(tmp_path / "palette.npy")
