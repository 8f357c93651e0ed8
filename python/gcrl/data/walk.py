"""The files below a folder, through symbolic links."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Found(NamedTuple):
    """A file by the name it was found under, and where it really lies."""

    path: Path
    real: str  # without links


def walk(folder: Path, root: Path | None = None) -> list[Found]:
    """All that is no folder below `folder`, sorted by name; nothing hidden.

    Links are followed, to files and to folders, but for those that lead back to a folder that
    they lie in, or that `root` lies in: these would never end. A folder that several names lead
    to is entered once, under the one that needs no link, or else the first; a file is found under
    each. Raises OSError where a folder cannot be read.
    """
    outermost = os.path.realpath(root or folder)
    found: list[Found] = []
    folders = {os.path.realpath(folder)}
    pending = [(folder, os.path.realpath(folder))]
    links: list[Path] = []  # followed when nothing else is left
    while pending or links:
        if not pending:
            link = links.pop(0)
            real = os.path.realpath(link)
            if leads_back(real, os.path.realpath(link.parent)) or leads_back(real, outermost):
                continue
            if not os.path.isdir(real):
                found.append(Found(link, real))
                continue
            if real in folders:
                continue
            folders.add(real)
            pending.append((link, real))
        path, real = pending.pop()
        for entry in visible(path):
            below = os.path.join(real, entry.name)
            if entry.is_symlink():
                links.append(path / entry.name)
            elif not entry.is_dir():
                found.append(Found(path / entry.name, below))
            elif below not in folders:
                folders.add(below)
                pending.append((path / entry.name, below))
    return sorted(found)


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder and is not hidden, sorted by name."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(shown, key=lambda entry: entry.name)


def leads_back(real: str, place: str) -> bool:
    """Whether `real` is the folder `place` or one around it; both without links."""
    return Path(place).is_relative_to(real)
