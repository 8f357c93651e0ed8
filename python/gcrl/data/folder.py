"""Images in a folder: in one folder per class, or side by side without classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gcrl.data.budget import Budget
from gcrl.data.dataset import DataError, Dataset, ImageSet, hold_out
from gcrl.data.notices import counted, warn
from gcrl.data.picture import EXTENSIONS, decoding, read_picture
from gcrl.data.walk import Found, leads_back, visible, walk
from gcrl.paths import name_of

SPLITS = ("train", "test")
OTHER_SPLITS = ("val", "valid", "validation", "dev")  # known by name, and not read
PROGRESS_FROM = 2000  # images, from which on reading them shows a bar


def load(path: Path, grid: tuple[int, int], seed: int) -> Dataset:
    """Read PATH/CLASS/… or PATH/*, or either of them twice in PATH/train and PATH/test.

    Classes and images are taken in the order of their names; nothing hidden is read, links are
    followed, and a picture that several names lead to counts once, in the class that it lies in
    itself. Without train and test, a fifth is held out by the seed. train and test, in any case,
    are a split where both are there; one of them beside other folders is a class like these.
    What is left out is said in a line on stderr. Raises DataError, naming the file or folder.
    """
    try:
        split = _find_split(path)
        if not split:
            part = _find_part(path)
            everything = part.read(grid)
            try:
                train, test = hold_out(everything, seed)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
            return Dataset(name_of(path), train, test, part.class_names)

        train_part, test_part = map(_find_part, split)
        if (train_part.class_names is None) != (test_part.class_names is None):
            raise DataError(
                f"{path}: expected class folders in both train/ and test/, or in neither"
            )
        classes = train_part.class_names
        unknown = sorted(set(test_part.class_names or ()) - set(classes or ()))
        if unknown:
            raise DataError(f"{test_part.path / unknown[0]}: a class that train/ does not have")
        train, test = train_part.read(grid), test_part.read(grid, classes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return Dataset(name_of(path), train, test, classes)


def _find_split(path: Path) -> list[Path] | None:
    """The folders train and test; None where the folders, if any, are classes."""
    names = [entry.name for entry in visible(path) if os.path.isdir(entry)]
    found = {split: [name for name in names if name.lower() == split] for split in SPLITS}
    others = [name for name in names if name.lower() not in (*SPLITS, *OTHER_SPLITS)]
    present = [split for split in SPLITS if found[split]]
    if len(present) == 2:
        for name in names:
            if name.lower() not in SPLITS:
                warn(path, f"{name}/ is left out, as train/ and test/ are a split")
        if any(len(found[split]) > 1 for split in SPLITS):
            raise DataError(f"{path}: expected one train/ and one test/, got {', '.join(names)}")
        return [path / found[split][0] for split in SPLITS]
    if present and others:
        warn(path, f"{found[present[0]][0]}/ is read as a class, like {others[0]}/ beside it")
    elif present:
        absent = "test" if present == ["train"] else "train"
        raise DataError(f"{path}: has {present[0]}/ but no {absent}/ beside it")
    return None


@dataclass(frozen=True)
class _Part:
    """The pictures below a folder, by class; of a flat folder, under one name that is None."""

    path: Path
    files: dict[str | None, list[Path]]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = tuple(name for name in self.files if name is not None)
        return names or None

    def read(self, grid: tuple[int, int], classes: tuple[str, ...] | None = None) -> ImageSet:
        """The images; labels count in `classes`, by default the part's own."""
        files = [file for group in self.files.values() for file in group]
        images = read_images(files, grid, self.path)
        names = classes or self.class_names
        if names is None:
            return ImageSet(images, None)
        numbers = [names.index(name) for name in self.files if name is not None]
        return ImageSet(images, np.repeat(numbers, [len(files) for files in self.files.values()]))


def _find_part(path: Path) -> _Part:
    """Find the pictures, and say what is left out. Raises DataError where there are none."""
    entries = visible(path)
    real = os.path.realpath(path)
    folders = [
        entry.name
        for entry in entries
        if os.path.isdir(entry) and not leads_back(os.path.realpath(entry), real)
    ]
    here = [
        Found(Path(entry), os.path.realpath(entry)) for entry in entries if not os.path.isdir(entry)
    ]
    below = {name: walk(path / name, path) for name in folders}
    flat = [file for file in here if _is_picture(file.path)]
    pictures = {name: [f for f in files if _is_picture(f.path)] for name, files in below.items()}
    named = [name for name, files in pictures.items() if files]
    if flat and named:
        raise DataError(
            f"{path}: expected images or class folders, got both ({named[0]}/ and others)"
        )
    if not flat and not named:
        raise DataError(f"{path}: has no images ({', '.join(EXTENSIONS)})")
    _say_what_is_left_out(path, [*here, *(file for files in below.values() for file in files)])
    groups: dict[str | None, list[Found]] = (
        {None: flat} if flat else {n: pictures[n] for n in named}
    )
    files = _each_once(path, groups)
    empty = [name for name in folders if not files.get(name)]
    if empty:
        warn(path, f"{counted(len(empty), 'folder')} without images left out: {_listed(empty)}")
    return _Part(path, {name: group for name, group in files.items() if group})


def _each_once(path: Path, groups: dict[str | None, list[Found]]) -> dict[str | None, list[Path]]:
    """A picture that several names lead to, where it lies itself, or else under the first."""
    root = os.path.realpath(path)
    taken: dict[str, Path] = {}
    for itself in (True, False):
        for found in (file for group in groups.values() for file in group):
            lies_there = found.real == os.path.join(root, os.path.relpath(found.path, path))
            if lies_there is itself:
                taken.setdefault(found.real, found.path)
    files = {
        name: [found.path for found in group if taken[found.real] == found.path]
        for name, group in groups.items()
    }
    again = sum(map(len, groups.values())) - sum(map(len, files.values()))
    if again:
        warn(path, f"{counted(again, 'name')} of pictures that others lead to as well left out")
    return files


def _say_what_is_left_out(path: Path, files: list[Found]) -> None:
    other = [file for file in files if file.path.suffix.lower() not in EXTENSIONS]
    if other:
        suffixes = Counter(file.path.suffix.lower() or "no ending" for file in other)
        names = [suffix for suffix, _ in suffixes.most_common()]
        warn(path, f"{counted(len(other), 'file')} left out, by their names: {_listed(names)}")
    broken = [
        file.path
        for file in files
        if file.path.suffix.lower() in EXTENSIONS and not file.path.is_file()
    ]
    if broken:
        warn(path, f"{counted(len(broken), 'name')} of no file left out: {_listed(broken)}")


def _listed(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in the folder itself, sorted by name; nothing hidden."""
    return [path for path in map(Path, visible(folder)) if _is_picture(path)]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def read_images(files: list[Path], grid: tuple[int, int], source: Path) -> np.ndarray:
    """uint8 [N, H, W, 3], in the order of the files; decoding runs in threads.

    What is lost of the pictures is said, about `source`. Raises DataError, naming the file.
    """
    out = np.empty((len(files), *grid, 3), dtype=np.uint8)
    transparent = animated = 0
    budget = Budget()
    with decoding(budget), ThreadPoolExecutor() as pool:
        pictures = pool.map(lambda file: read_picture(file, grid, budget), files)
        few = len(files) < PROGRESS_FROM
        bar = tqdm(pictures, "reading images", len(files), disable=few, unit="image")
        for index, picture in enumerate(bar):
            out[index] = picture.pixels
            transparent += picture.was_transparent
            animated += picture.was_animated
    if transparent:
        warn(source, f"the transparency of {counted(transparent, 'picture')} is dropped")
    if animated:
        warn(source, f"of {counted(animated, 'file')} with several pictures the first is taken")
    return out
