"""Real images to train on: the embedded digits, CIFAR-10, .npz files and folders."""

from __future__ import annotations

from pathlib import Path

from gcrl.config import ConfigError
from gcrl.data import cifar10, digits, folder, npz
from gcrl.data.budget import memory_limit
from gcrl.data.dataset import DataError, Dataset, ImageSet
from gcrl.data.download import fetch_cifar10
from gcrl.data.resize import fit_to_grid
from gcrl.paths import expand

__all__ = ["DataError", "Dataset", "ImageSet", "fit_to_grid", "load_dataset", "memory_limit"]

NAMES = (digits.NAME,)  # sources that are no paths


def load_dataset(
    source: str, grid: tuple[int, int], *, download: bool = False, seed: int = 0
) -> Dataset:
    """Load images and bring them to the grid (height, width).

    source is 'digits', the folder of CIFAR-10's batches or the one above it, an .npz file (see
    gcrl.data.npz) or a folder of images (see gcrl.data.folder). download fetches CIFAR-10 into that
    folder if it is not there yet. The seed chooses the images held out for testing where a source
    does not say which. Within `memory_limit` it takes about so much memory at most, else 4 GB.
    What is left out of the images is said in lines on stderr. Raises DataError, which names the
    file and what is wrong with it.
    """
    if source == digits.NAME:
        if download:
            raise DataError("download fetches CIFAR-10 into a folder; the digits need no download")
        return digits.load(grid)
    try:
        path = expand(source)
    except ConfigError as error:
        raise DataError(str(error)) from error
    if download:
        path = _downloaded(path)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder. Expected 'digits', a CIFAR-10 folder (download can "
            "fetch it), an .npz file or a folder of images"
        )
    dataset = _load_path(path, grid, seed)
    for part, name in ((dataset.train, "train on"), (dataset.test, "test with")):
        if len(part) < 2:
            raise DataError(f"{path}: expected at least 2 images to {name}, got {len(part)}")
    return dataset


def _load_path(path: Path, grid: tuple[int, int], seed: int) -> Dataset:
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"{path}: expected an .npz file or a folder, got another file")
        return npz.load(path, grid, seed)
    if not path.is_dir():
        raise DataError(f"{path}: expected an .npz file or a folder, got neither")
    batches = cifar10.find(path)
    return cifar10.load(batches, grid) if batches else folder.load(path, grid, seed)


def _downloaded(path: Path) -> Path:
    """The folder of CIFAR-10's batches, fetched unless it is there and complete."""
    if path.is_file():
        raise DataError(f"{path}: download expects a folder for CIFAR-10, got a file")
    batches = cifar10.find(path)
    if batches is not None and not cifar10.missing(batches):
        return batches
    return fetch_cifar10(path.parent if path.name == cifar10.FOLDER else path)
