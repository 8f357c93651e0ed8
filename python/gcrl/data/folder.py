"""Images in a folder: in one folder per class, or side by side without classes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from gcrl.data.dataset import DataError, Dataset, ImageSet, hold_out
from gcrl.data.resize import fit_to_grid

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
PROGRESS_FROM = 2000  # images, from which on reading them shows a bar


def load(path: Path, grid: tuple[int, int], seed: int) -> Dataset:
    """Read PATH/CLASS/… or PATH/*, or either of them twice in PATH/train and PATH/test.

    Classes and images are taken in the order of their names. Without train and test, a fifth is
    held out by the seed. Raises DataError, naming the file or folder.
    """
    parts = [part for part in ("train", "test") if (path / part).is_dir()]
    if len(parts) == 1:
        other = "test" if parts == ["train"] else "train"
        raise DataError(f"{path}: has {parts[0]}/ but no {other}/ beside it")
    if not parts:
        class_names = _class_names(path)
        everything = _read_part(path, class_names, grid)
        try:
            train, test = hold_out(everything, seed)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        return Dataset(path.name, train, test, class_names)

    class_names = _class_names(path / "train")
    test_names = _class_names(path / "test")
    if (class_names is None) != (test_names is None):
        raise DataError(f"{path}: expected class folders in both train/ and test/, or in neither")
    unknown = sorted(set(test_names or ()) - set(class_names or ()))
    if unknown:
        raise DataError(f"{path / 'test' / unknown[0]}: a class that train/ does not have")
    train = _read_part(path / "train", class_names, grid)
    test = _read_part(path / "test", class_names, grid)
    return Dataset(path.name, train, test, class_names)


def _class_names(path: Path) -> tuple[str, ...] | None:
    """The folders with images below `path`, sorted; None where images lie in `path` itself."""
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not _hidden(entry)]
    names = tuple(sorted(folder.name for folder in folders if _image_files(folder)))
    flat = any(_is_image(entry) for entry in path.iterdir())
    if flat and names:
        raise DataError(
            f"{path}: expected images or class folders, got both ({names[0]}/ and others)"
        )
    if not flat and not names:
        raise DataError(f"{path}: has no images ({', '.join(EXTENSIONS)})")
    return names or None


def _image_files(folder: Path) -> list[Path]:
    """All images below `folder`, sorted."""
    return sorted(file for file in folder.rglob("*") if _is_image(file))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not _hidden(path) and path.is_file()


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _read_part(path: Path, class_names: tuple[str, ...] | None, grid: tuple[int, int]) -> ImageSet:
    if class_names is None:
        files = sorted(file for file in path.iterdir() if _is_image(file))
        return ImageSet(read_images(files, grid), None)
    by_class = [_image_files(path / name) for name in class_names]
    labels = np.repeat(np.arange(len(class_names)), [len(files) for files in by_class])
    return ImageSet(read_images([*chain.from_iterable(by_class)], grid), labels)


def read_images(files: list[Path], grid: tuple[int, int]) -> np.ndarray:
    """uint8 [N, H, W, 3], in the order of the files; decoding runs in threads."""
    out = np.empty((len(files), *grid, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda file: _read_image(file, grid), files)
        few = len(files) < PROGRESS_FROM
        bar = tqdm(images, "reading images", len(files), disable=few, unit="image")
        for index, image in enumerate(bar):
            out[index] = image
    return out


def _read_image(file: Path, grid: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                pixels = np.asarray(image) >> 8
                image = Image.fromarray(pixels.astype(np.uint8))
            if image.mode in ("I", "F"):
                raise DataError(f"expected 8 or 16 bits a channel, got mode {image.mode}")
            rgb = np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise what they like on damaged files
        raise DataError(f"{file}: cannot be read as an image: {error}") from error
    return fit_to_grid(rgb[np.newaxis], grid)[0]
