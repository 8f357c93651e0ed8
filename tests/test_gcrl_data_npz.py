"""Images in .npz files, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_run import random_images

from gcrl.data import DataError, fit_to_grid, load_dataset


def test_npz_with_a_test_part(tmp_path: Path) -> None:
    images, test_images = random_images(6, 8, 8, 3), random_images(3, 16, 16, 3, seed=1)
    np.savez(
        tmp_path / "set.npz",
        images=images,
        labels=np.arange(6, dtype=np.uint8),
        test_images=test_images,
        test_labels=[2, 1, 0],
    )
    dataset = load_dataset(str(tmp_path / "set.npz"), (8, 8))
    assert (dataset.name, dataset.class_names) == ("set", None)
    assert np.array_equal(dataset.train.images, images)
    assert np.array_equal(dataset.test.images, fit_to_grid(test_images, (8, 8)))
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.test.labels.tolist() == [2, 1, 0]
    assert dataset.train.labels.dtype == dataset.test.labels.dtype == np.int64


def test_npz_is_split_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    labels = np.repeat(np.arange(10), 10)
    images = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    np.savez(path, images=images, labels=labels)
    first, again, other = (load_dataset(str(path), (1, 1), seed=seed) for seed in (0, 0, 1))
    drawn = [part.test.images[:, 0, 0, 0].tolist() for part in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert np.bincount(first.test.labels).tolist() == [2] * 10
    assert np.array_equal(first.test.labels, labels[drawn[0]])
    whole = drawn[0] + first.train.images[:, 0, 0, 0].tolist()
    assert sorted(whole) == list(range(100))


def test_npz_grey_and_without_labels(tmp_path: Path) -> None:
    images = random_images(10, 8, 8)
    np.savez_compressed(tmp_path / "grey.npz", images=images)
    dataset = load_dataset(str(tmp_path / "grey.npz"), (8, 8))
    assert dataset.train.labels is None
    assert dataset.test.labels is None
    assert (len(dataset.train), len(dataset.test)) == (8, 2)
    assert (dataset.train.images == dataset.train.images[..., :1]).all()
    assert dataset.train.images[0, ..., 0].tobytes() in {image.tobytes() for image in images}


IMAGES = random_images(8, 8, 8, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, r"expected an array 'images', got \['pictures'\]"),
        (
            {"images": IMAGES.astype(np.float32)},
            r"'images': expected uint8 .*, got float32 \[8, 8, 8",
        ),
        (
            {"images": IMAGES.transpose(0, 3, 1, 2)},
            r"'images': expected uint8 .*, got uint8 \[8, 3, 8",
        ),
        ({"images": IMAGES[:, :0]}, r"'images': expected uint8"),
        ({"images": IMAGES[0, 0]}, r"'images': expected uint8 .*, got uint8 \[8, 3\]"),
        (
            {"images": IMAGES, "labels": np.arange(7)},
            r"'labels': expected one per image, \[8\], got",
        ),
        ({"images": IMAGES, "labels": np.arange(8.0)}, "'labels': expected integers, got float64"),
        ({"images": IMAGES, "labels": ["cat"] * 8}, "'labels': expected integers, got <U3"),
        ({"images": IMAGES, "labels": np.arange(8) - 1}, "'labels': expected none below 0, got -1"),
        (
            {"images": IMAGES, "labels": np.array([{}] * 8)},
            "'labels': expected numbers, got Python objects",
        ),
        ({"images": IMAGES, "test_labels": np.arange(8)}, "'test_labels' but no 'test_images'"),
        ({"images": IMAGES, "labels": np.arange(8), "test_images": IMAGES}, "both, or neither"),
        ({"images": IMAGES, "test_images": IMAGES[:1]}, "at least 2 images to test with, got 1"),
        ({"images": IMAGES[:1], "test_images": IMAGES}, "at least 2 images to train on, got 1"),
        ({"images": IMAGES[:1]}, "at least 4 images, .* got 1"),
        ({"images": IMAGES[:0]}, "at least 4 images, .* got 0"),
    ],
)
def test_a_wrong_npz_is_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=f"wrong.npz: .*{message}"):
        load_dataset(str(path), (8, 8))


def test_a_damaged_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, images=IMAGES)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], b"", b"no archive", bytes(middle)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged.npz: (not an .npz file|cannot be read)"):
            load_dataset(str(path), (8, 8))
