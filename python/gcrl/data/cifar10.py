"""CIFAR-10 in its official Python layout: cifar-10-batches-py with six batches and batches.meta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gcrl.data.dataset import DataError, Dataset, ImageSet
from gcrl.data.plain_pickle import read_pickle
from gcrl.data.resize import fit_to_grid

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
META_FILE = "batches.meta"
FILES = (*TRAIN_FILES, TEST_FILE, META_FILE)


def find(path: Path) -> Path | None:
    """The folder of the batches, `path` itself or one in it; None if it is not there."""
    for folder in (path, path / FOLDER):
        if folder.name == FOLDER and folder.is_dir():
            return folder
        if any((folder / name).is_file() for name in FILES):
            return folder
    return None


def missing(folder: Path) -> list[str]:
    """The files that the folder lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def load(folder: Path, grid: tuple[int, int]) -> Dataset:
    """Read all batches: 50,000 images to train on and 10,000 to test with, 10 classes.

    Nothing in the files can run code: see plain_pickle. Raises DataError, naming the file.
    """
    absent = missing(folder)
    if absent:
        raise DataError(f"{folder}: CIFAR-10 is not complete: {', '.join(absent)} missing")
    class_names = _read_class_names(folder / META_FILE)
    parts = [_read_batch(folder / name, len(class_names), grid) for name in TRAIN_FILES]
    train = ImageSet(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
    test = _read_batch(folder / TEST_FILE, len(class_names), grid)
    return Dataset("cifar10", train, test, class_names)


def _read_class_names(file: Path) -> tuple[str, ...]:
    names = _entry(file, read_pickle(file), b"label_names")
    if not isinstance(names, list) or not names or not all(type(n) is bytes for n in names):
        raise DataError(f"{file}: 'label_names': expected a list of names")
    return tuple(name.decode("latin-1") for name in names)


def _read_batch(file: Path, classes: int, grid: tuple[int, int]) -> ImageSet:
    batch = read_pickle(file)
    data = _entry(file, batch, b"data")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        got = list(data.shape) if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{file}: 'data': expected uint8 [N, 3072], got {got}")
    labels = _entry(file, batch, b"labels")
    if not isinstance(labels, list) or len(labels) != len(data):
        got = f"{len(labels)}" if isinstance(labels, list) else type(labels).__name__
        raise DataError(f"{file}: 'labels': expected a list of {len(data)}, got {got}")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise DataError(f"{file}: 'labels': expected integers from 0 to {classes - 1}")
    planes = data.reshape(-1, 3, 32, 32)
    images = fit_to_grid(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), grid)
    return ImageSet(images, np.array(labels, dtype=np.int64))


def _entry(file: Path, contents: Any, key: bytes) -> Any:
    if not isinstance(contents, dict) or key not in contents:
        raise DataError(f"{file}: not a file of CIFAR-10: it has no '{key.decode()}'")
    return contents[key]
