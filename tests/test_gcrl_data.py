"""Images on a grid, the digits, and sources that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances_argmin
from tiny_run import random_images

from gcrl.data import DataError, ImageSet, fit_to_grid, load_dataset
from gcrl.data.dataset import hold_out

# fit_to_grid


def test_blocks_are_averaged_exactly() -> None:
    images = random_images(5, 12, 24, 3)
    fitted = fit_to_grid(images, (4, 8))
    means = images.astype(float).reshape(5, 4, 3, 8, 3, 3).mean(axis=(2, 4))
    assert fitted.dtype == np.uint8
    assert np.array_equal(fitted, np.floor(means + 0.5))


def test_white_stays_white_in_large_blocks() -> None:
    images = np.full((1, 2048, 2048, 3), 255, dtype=np.uint8)
    assert (fit_to_grid(images, (2, 2)) == 255).all()


def test_the_middle_is_kept_where_the_aspect_differs() -> None:
    images = np.zeros((2, 16, 48, 3), dtype=np.uint8)
    images[:, :, 16:32] = random_images(2, 16, 16, 3)
    assert np.array_equal(fit_to_grid(images, (8, 8)), fit_to_grid(images[:, :, 16:32], (8, 8)))
    assert np.array_equal(fit_to_grid(images, (16, 16)), images[:, :, 16:32])


@pytest.mark.parametrize("size", [(7, 7), (30, 20), (100, 37), (64, 65)])
def test_other_sizes_are_resampled(size: tuple[int, int]) -> None:
    row, column = np.mgrid[: size[0], : size[1]] + 0.5
    waves = np.stack([row / size[0], column / size[1], 0 * row], axis=-1) * 200
    fitted = fit_to_grid(waves.astype(np.uint8)[np.newaxis], (16, 16))[0].astype(float)
    assert fitted.shape == (16, 16, 3)
    middle = fitted[4:12, 4:12].mean(axis=(0, 1))
    assert middle == pytest.approx([100, 100, 0], abs=2)


def test_fine_stripes_are_smoothed_not_sampled() -> None:
    stripes = np.zeros((1, 50, 50, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(fit_to_grid(stripes, (16, 16)).astype(int) - 100).max() < 25


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)],
)
def test_fit_to_grid_refuses_other_arrays(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images: expected uint8"):
        fit_to_grid(images, (4, 4))


# digits


def test_digits_are_the_same_on_every_call() -> None:
    first, second = load_dataset("digits", (16, 16)), load_dataset("digits", (16, 16), seed=7)
    assert (len(first.train), len(first.test)) == (4 * 1438, 4 * 359)
    assert first.train.images.shape[1:] == (16, 16, 3)
    assert first.class_names == tuple("0123456789")
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.test.labels, second.test.labels)
    assert np.bincount(first.test.labels).min() >= 4 * 34  # every class alike


def test_each_digit_is_four_times_in_one_part() -> None:
    real = load_digits()
    dataset = load_dataset("digits", (16, 16))
    shapes = upper_left(real.images)
    painted = [upper_left(part.images.max(axis=3)) for part in (dataset.train, dataset.test)]
    train, test = (pairwise_distances_argmin(part, shapes) for part in painted)  # whose
    assert np.array_equal(np.bincount(np.concatenate((train, test))), np.full(1797, 4))
    assert not set(train) & set(test)
    assert np.array_equal(real.target[train], dataset.train.labels)
    assert np.array_equal(real.target[test], dataset.test.labels)
    everything = ImageSet(real.images, real.target)
    held_out = {digit.tobytes() for digit in hold_out(everything, 0)[1].images}
    assert {digit.tobytes() for digit in real.images[test]} == held_out


def upper_left(pictures: np.ndarray) -> np.ndarray:
    """[N, side, side], each dark around at most 8x8 -> [N, 64]: those at the corner, 1 at most."""
    corners = np.zeros((len(pictures), 8, 8))
    bright = pictures / pictures.max(axis=(1, 2))[:, None, None]
    for corner, picture in zip(corners, bright, strict=True):
        rows, columns = np.nonzero(picture)
        part = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        corner[: part.shape[0], : part.shape[1]] = part
    return corners.reshape(len(pictures), 64)


def test_digits_have_their_own_colours_and_places() -> None:
    images = load_dataset("digits", (16, 16)).train.images
    assert images.max(axis=(1, 2)).min() > 100  # bright in every channel
    assert images.max(axis=(1, 2)).std(axis=0).min() > 30
    lit = images.any(axis=3)  # [N, 16, 16]
    rows, columns = lit.any(axis=2).argmax(axis=1), lit.any(axis=1).argmax(axis=1)
    assert set(range(9)) <= set(rows)
    assert set(range(9)) <= set(columns)
    for copies in images.reshape(4, -1, 16, 16, 3).swapaxes(0, 1):
        assert len({copy.tobytes() for copy in copies}) == 4


def test_digits_lie_on_plain_black() -> None:
    images = load_dataset("digits", (16, 16)).train.images
    black = (images == 0).all(axis=3).sum(axis=(1, 2))
    assert black.min() >= 16 * 16 - 8 * 8


def test_strokes_are_shades_of_one_colour() -> None:
    images = load_dataset("digits", (16, 16)).train.images.astype(float)
    pixels = images.reshape(len(images), -1, 3)  # [N, 256, 3]
    brightest = np.linalg.norm(pixels, axis=2).argmax(axis=1)
    colour = pixels[np.arange(len(images)), brightest]
    direction = colour / np.linalg.norm(colour, axis=1, keepdims=True)
    along = np.einsum("npc,nc->np", pixels, direction)
    assert np.abs(pixels - along[..., None] * direction[:, None]).max() < 1.5


def test_pixels_of_the_digits_say_little() -> None:
    from sklearn.linear_model import RidgeClassifier

    digits = load_dataset("digits", (16, 16))
    train, test = (part.images.reshape(len(part), -1) / 255 for part in (digits.train, digits.test))
    probe = RidgeClassifier(alpha=100).fit(train, digits.train.labels)
    assert probe.score(test, digits.test.labels) < 0.25


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such file or folder. Expected 'digits'"):
        load_dataset(str(tmp_path / "absent"), (8, 8))
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"a.csv: expected an .npz file or a folder"):
        load_dataset(str(tmp_path / "a.csv"), (8, 8))
