"""Corrupted images, and what becomes of accuracy on them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from PIL import Image

from gcrl.config import ConfigError
from gcrl.evaluation import corruption
from gcrl.evaluation.corruptions import (
    CORRUPTIONS,
    MISSING,
    SEVERITIES,
    _along_a_line,
    _plasma,
    _zoom,
    corrupt,
)  # fmt: skip
from gcrl.evaluation.options import Options
from gcrl.evaluation.subject import Subject
from gcrl.run import Run

GREY = np.full((300, 8, 8, 3), 128, dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run.tiny_run(tmp_path_factory.mktemp("run"))


def scene(count: int = 4, side: int = 32) -> np.ndarray:
    """Blocks of colour with some texture."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(20, 236, (count, side // 8, side // 8, 3))
    images = np.roll(coarse.repeat(8, axis=1).repeat(8, axis=2), (3, 5), (1, 2))
    images = images + rng.integers(-10, 11, images.shape)
    return images.astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_repeats_and_grows(name: str) -> None:
    images = scene()
    changes = []
    for severity in SEVERITIES:
        changed = corrupt(images, name, severity)
        assert changed.shape == images.shape
        assert changed.dtype == np.uint8
        assert np.array_equal(changed, corrupt(images, name, severity))
        changes.append(np.abs(changed.astype(float) - images).mean())
    assert min(changes) > 0 or name in ("defocus_blur", "glass_blur")  # published so mild
    assert changes[4] > changes[0] or name == "elastic_transform"  # published so: it begins affine
    if name in ("gaussian_noise", "shot_noise", "impulse_noise", "brightness", "contrast"):
        assert changes == sorted(changes)


def test_fourteen_of_fifteen() -> None:
    assert len(CORRUPTIONS) == 14
    assert MISSING == ("frost",)
    assert {len(parameters) for _, parameters in CORRUPTIONS.values()} == {5}


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_published_strength(severity: int) -> None:
    at = severity - 1
    level = 128 / 255
    noise = corrupt(GREY, "gaussian_noise", severity) / 255 - level
    assert noise.std() == pytest.approx([0.04, 0.06, 0.08, 0.09, 0.10][at], rel=0.02)
    shot = corrupt(GREY, "shot_noise", severity) / 255 - level
    photons = [500, 250, 100, 75, 50][at]
    assert shot.std() == pytest.approx(np.sqrt(level / photons), rel=0.02)
    impulse = corrupt(GREY, "impulse_noise", severity)
    share = [0.01, 0.02, 0.03, 0.05, 0.07][at]
    for extreme in (0, 255):
        assert np.mean(impulse == extreme) == pytest.approx(share / 2, rel=0.15)


def test_brightness_adds_to_the_largest_channel() -> None:
    image = np.array([100, 50, 0], dtype=np.uint8) * np.ones((1, 2, 2, 1), dtype=np.uint8)
    assert corrupt(image, "brightness", 5)[0, 0, 0].tolist() == [176, 88, 0]  # 100 + 0.3 * 255
    assert corrupt(np.zeros_like(image), "brightness", 1)[0, 0, 0].tolist() == [13, 13, 13]


def test_contrast_draws_towards_the_mean_of_each_channel() -> None:
    image = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    image[0, 0] = 200
    assert sorted(set(corrupt(image, "contrast", 3).flat)) == [60, 140]  # 100 ± 0.4 * 100


def test_pixelate_and_jpeg_are_pillows() -> None:
    images = scene(1)
    picture = Image.fromarray(images[0])
    small = picture.resize((20, 20), Image.Resampling.BOX)  # 0.65 of 32
    expected = small.resize((32, 32), Image.Resampling.NEAREST)
    assert np.array_equal(corrupt(images, "pixelate", 5)[0], np.asarray(expected))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=40)
    decoded = np.asarray(Image.open(content))
    assert np.array_equal(corrupt(images, "jpeg_compression", 5)[0], decoded)


def test_glass_moves_pixels_by_one_at_most() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    changed = corrupt(images, "glass_blur", 1)  # a deviation of 0.05 pixels blurs nothing
    from_above, from_left, from_both = (
        (changed[:, 1:, 1:] == images[:, rows, columns]).all(-1)
        for rows, columns in (
            (slice(-1), slice(1, None)),
            (slice(1, None), slice(-1)),
            (slice(-1), slice(-1)),
        )
    )
    stays = (changed == images).all(-1)[:, 1:, 1:]
    for moves in (from_above, from_left, from_both, stays):
        assert moves.mean() == pytest.approx(0.25, abs=0.1)
    assert (from_above | from_left | from_both | stays).all()


def test_defocus_of_a_point_is_a_disk() -> None:
    point = np.zeros((1, 21, 21, 3), dtype=np.uint8)
    point[0, 10, 10] = 255
    spread = corrupt(point, "defocus_blur", 5)[0, :, :, 0]  # radius 1.5: a block of 3x3
    assert np.array_equal(np.argwhere(spread > 20), np.argwhere(np.ones((3, 3))) + 9)
    assert spread[9:12, 9:12].std() < 1


def test_motion_goes_along_a_line() -> None:
    point = np.zeros((2, 9, 9, 1))
    point[:, 4, 4] = 1
    blurred = _along_a_line(point, 1, 1.0, np.array([0.0, -90.0]))[..., 0]
    weights = np.exp(-0.5 * np.arange(3) ** 2)
    weights /= weights.sum()
    np.testing.assert_allclose(blurred[0, 4, 2:5][::-1], weights)
    np.testing.assert_allclose(blurred[1, 4:7, 4], weights)
    assert blurred.sum() == pytest.approx(2)


def test_zoom_enlarges_the_middle() -> None:
    ramp = np.arange(9.0)[None, :, None] * np.ones((1, 1, 9))
    np.testing.assert_allclose(_zoom(ramp, 2)[0, :, 0], 4 + (np.arange(9) - 4) / 2)
    assert np.array_equal(_zoom(ramp, 1), ramp)


def test_fog_is_the_mean_of_its_cloud_and_rougher_with_less_decay() -> None:
    rough, smooth = (_plasma(4, 30, d, np.random.default_rng(0)) for d in (1.75, 3))
    for cloud in (rough, smooth):
        assert cloud.shape == (4, 32, 32)
        assert (cloud.min((1, 2)).tolist(), cloud.max((1, 2)).tolist()) == ([0] * 4, [1] * 4)
    steps = [np.abs(np.diff(cloud, axis=1)).mean() for cloud in (rough, smooth)]
    assert steps[0] > 1.3 * steps[1]
    changed = corrupt(GREY[:1], "fog", 5)[0, ..., 0] / 255
    cloud = _plasma(1, 8, 1.75, np.random.default_rng((0, 8, 5)))[0]
    level = 128 / 255
    np.testing.assert_allclose(changed, (level + 1.5 * cloud) * level / (level + 1.5), atol=0.002)


def test_the_cloud_wobbles_less_by_the_square_of_the_decay() -> None:
    decay, rng = 3.0, np.random.default_rng(0)
    clouds = _plasma(400, 16, decay, rng)
    # The middle of a square of side 2 is wobbled one level later than that of one of side 4.
    wobbles = []
    for step in (4, 2):
        corners = clouds[:, ::step, ::step]
        mean = (corners + np.roll(corners, -1, 1) + np.roll(corners, -1, 2)
                + np.roll(corners, (-1, -1), (1, 2))) / 4  # fmt: skip
        wobbles.append(clouds[:, step // 2 :: step, step // 2 :: step] - mean)
    assert wobbles[0].std() / wobbles[1].std() == pytest.approx(decay**2, rel=0.05)


@pytest.mark.parametrize(("name", "severity"), [("frost", 1), ("fog", 0), ("fog", 6)])
def test_unknown_corruptions_are_refused(name: str, severity: int) -> None:
    with pytest.raises(ValueError, match=r"name: expected one of|severity: expected 1 to 5"):
        corrupt(GREY, name, severity)


def subject_of(run: Run, folder: Path, **options) -> Subject:
    chosen = Options(corruption_images=8, **options)
    return Subject(run, tiny_run.color_classes(), folder, chosen, progress=False)


def test_accuracy_at_every_severity(run: Run, tmp_path: Path, monkeypatch) -> None:
    names = ("contrast", "brightness")
    monkeypatch.setattr(corruption, "CORRUPTIONS", {name: CORRUPTIONS[name] for name in names})

    class First:
        """Is right for the first so many images, one fewer each time it is asked."""

        right = 11

        def score(self, features: np.ndarray, labels: np.ndarray) -> float:
            assert len(features) == len(labels) == 8
            self.right -= 1
            return self.right / 10

    monkeypatch.setattr("gcrl.evaluation.probe.train_probe", lambda *_: First())
    results = corruption.measure(subject_of(run, tmp_path))
    assert results["corruptions"]["contrast"] == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert results["corruptions"]["brightness"] == [0.5, 0.4, 0.3, 0.2, 0.1]
    np.testing.assert_allclose(results["mean"], [0.75, 0.65, 0.55, 0.45, 0.35])
    assert results["images"] == results["clean_images"] == 8
    text = corruption.table(results)
    assert "| contrast | 100.0% | 90.0% | 80.0% | 70.0% | 60.0% | 80.0% |" in text
    assert "our own implementations on images of 4x4" in text


def test_missing_corruptions_are_named(run: Run, tmp_path: Path) -> None:
    results = corruption.measure(subject_of(run, tmp_path))
    assert len(results["corruptions"]) == 14
    assert results["missing"] == ["frost"]
    assert "Missing of the fifteen: frost." in corruption.table(results)


@pytest.fixture
def cifar10_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as CIFAR-10-C's, of 9 images at each severity."""
    monkeypatch.setattr(corruption, "CIFAR10_C", (9, 32, 32, 3))
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = np.zeros((45, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(45)
    np.save(folder / "frost.npy", images)
    np.save(folder / "fog.npy", images + 100)
    np.save(folder / "labels.npy", np.tile(np.arange(9) % 3, 5).astype(np.uint8))
    return folder


def test_cifar10_c_is_read_severity_by_severity(cifar10_c: Path) -> None:
    sets = list(corruption._cifar10_c(cifar10_c, ["frost", "fog"], 4, seed=0))
    assert [name for name, *_ in sets] == ["frost"] * 5 + ["fog"] * 5
    numbers = [images[:, 0, 0, 0] for _, images, _ in sets]
    assert len(set(numbers[0] % 9)) == 4
    for place in range(1, 5):
        assert np.array_equal(numbers[place], numbers[0] + 9 * place)
    for part, (_, _, labels) in zip(numbers[:5], sets, strict=False):
        assert np.array_equal(labels, part % 9 % 3)


def test_cifar10_c_is_measured_where_it_is_given(run: Run, tmp_path: Path, cifar10_c: Path) -> None:
    results = corruption.measure(subject_of(run, tmp_path, cifar10_c=cifar10_c))
    assert set(results["corruptions"]) == {"frost", "fog"}
    assert results["source"] == "CIFAR-10-C"
    assert "gaussian_noise" in results["missing"]
    assert "the files of CIFAR-10-C" in corruption.table(results)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fog.npy", np.zeros((45, 16, 16, 3), np.uint8), r"fog.npy: expected \[45, 32, 32, 3\]"),
        ("fog.npy", np.zeros((45, 32, 32, 3)), "fog.npy: expected uint8, got float64"),
        ("labels.npy", np.zeros(9), r"labels.npy: expected \[45\], got \[9\]"),
    ],
)
def test_files_that_are_not_cifar10_c_are_refused(
    cifar10_c: Path, name: str, content: np.ndarray, message: str
) -> None:
    np.save(cifar10_c / name, content)
    with pytest.raises(ConfigError, match=message):
        list(corruption._cifar10_c(cifar10_c, ["fog"], 4, seed=0))


def test_a_folder_without_cifar10_c_is_refused(run: Run, tmp_path: Path) -> None:
    subject = subject_of(run, tmp_path)
    subject = replace(subject, options=replace(subject.options, cifar10_c=tmp_path))
    with pytest.raises(ConfigError, match="has none of CIFAR-10-C's files"):
        corruption.measure(subject)
