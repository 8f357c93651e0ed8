"""CIFAR-10 in its official Python layout: cifar-10-batches-py with six batches and batches.meta."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gcrl.data.dataset import DataError, Dataset, ImageSet
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

    Nothing in the files can run code: see read_pickle. Raises DataError, naming the file.
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
    if not isinstance(names, list) or not names or not all(isinstance(n, bytes) for n in names):
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


class _Dtype:
    """Stands in for numpy.dtype: only unsigned bytes occur."""

    def __init__(self, code: bytes | str, align: int, copy: int) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"expected an array of unsigned bytes, got {code!r}")

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stands in for numpy.ndarray: takes bytes and a shape, and runs none of its code."""

    value: np.ndarray

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _Dtype) or fortran_order or not isinstance(content, bytes):
            raise pickle.UnpicklingError("expected an array of bytes in C order")
        self.value = np.frombuffer(content, dtype=np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Admits arrays of bytes beside plain values; any other name is refused, not looked up."""

    admitted: ClassVar[dict[tuple[str, str], type]] = {
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): _Array,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which CIFAR-10 does not need"
            )
        return self.admitted[module, name]


def read_pickle(file: Path) -> Any:
    """The contents of a file of CIFAR-10, without running anything that the file names.

    Strings come as bytes and arrays as uint8. Raises DataError if the file is damaged or holds
    anything else than plain values and arrays of bytes.
    """
    try:
        with file.open("rb") as stream:
            contents = _Unpickler(stream, encoding="bytes").load()
        if isinstance(contents, dict):
            return {
                key: value.value if isinstance(value, _Array) else value
                for key, value in contents.items()
            }
        return contents
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise DataError(f"{file}: not a file of CIFAR-10, or damaged: {error}") from error
