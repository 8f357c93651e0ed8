"""Images in an .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from gcrl.data.dataset import DataError, Dataset, ImageSet, hold_out
from gcrl.data.resize import fit_to_grid


def load(path: Path, grid: tuple[int, int], seed: int) -> Dataset:
    """Read `images` and optional `labels`, and `test_images` with optional `test_labels`.

    Images are uint8 [N, h, w, 3], or [N, h, w] if grey; labels are integers [N]. Without
    test_images a fifth is held out by the seed. Raises DataError, naming the file.
    """
    try:
        arrays = _read(path)
        train = _image_set(arrays, "", grid)
        if "test_images" in arrays:
            test = _image_set(arrays, "test_", grid)
            if (train.labels is None) != (test.labels is None):
                raise DataError("expected 'labels' and 'test_labels' both, or neither")
        elif "test_labels" in arrays:
            raise DataError("has 'test_labels' but no 'test_images'")
        else:
            train, test = hold_out(train, seed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error.__cause__
    return Dataset(path.stem, train, test, None)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays that are ours; nothing in the file is unpickled."""
    if not zipfile.is_zipfile(path):
        raise DataError("not an .npz file, or it is cut short")
    arrays: dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name in ("images", "labels", "test_images", "test_labels"):
                if name in stored.files:
                    arrays[name] = stored[name]
            names = stored.files
    except (
        Exception
    ) as error:  # a damaged archive fails in zipfile, zlib or numpy, each its own way
        raise DataError(f"cannot be read: {error}") from error
    if "images" not in arrays:
        raise DataError(f"expected an array 'images', got {names}")
    return arrays


def _image_set(arrays: dict[str, np.ndarray], prefix: str, grid: tuple[int, int]) -> ImageSet:
    name = prefix + "images"
    images = arrays[name]
    expected = f"'{name}': expected uint8 [N, height, width, 3] or [N, height, width]"
    if images.dtype != np.uint8:
        raise DataError(f"{expected}, got {images.dtype} {list(images.shape)}")
    if images.ndim == 3:
        images = np.repeat(images[..., np.newaxis], 3, axis=3)
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise DataError(f"{expected}, got uint8 {list(arrays[name].shape)}")
    labels = arrays.get(prefix + "labels")
    if labels is not None:
        labels = _check_labels(labels, prefix + "labels", len(images))
    return ImageSet(fit_to_grid(images, grid), labels)


def _check_labels(labels: np.ndarray, name: str, count: int) -> np.ndarray:
    if labels.dtype.kind not in "iu":
        raise DataError(f"'{name}': expected integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise DataError(f"'{name}': expected one per image, [{count}], got {list(labels.shape)}")
    labels = labels.astype(np.int64)
    if (labels < 0).any():
        raise DataError(f"'{name}': expected none below 0, got {labels.min()}")
    return labels
