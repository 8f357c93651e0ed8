"""The digits, and sources that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances_argmin

from gcrl.data import DataError, ImageSet, load_dataset
from gcrl.data.dataset import hold_out


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
