"""Paths as people write them."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from gcrl.config import ConfigError

TEXTS = ("data", "palette", "ood", "complete")  # fields that are text and hold paths


def expand(path: str | Path) -> Path:
    """The path with its ~ or ~user replaced; raises ConfigError for a user that is not here."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: no home folder is known for it: {error}") from error


def name_of(path: str | Path) -> str:
    """What a file or folder is called, also where the path ends in '.', '..' or is '/'."""
    return Path(os.path.abspath(expand(path))).name or "root"


def expand_all(settings: Any) -> Any:
    """A dataclass with every ~ in its paths replaced, in those that it holds too.

    A shell replaces only a ~ that begins a word: `--out ~/x`, but not `--out=~/x`.
    """
    changes: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            changes[field.name] = expand_all(value)
        elif isinstance(value, Path):
            changes[field.name] = expand(value)
        elif field.name in TEXTS and isinstance(value, str):
            changes[field.name] = _expand_text(value)
        elif field.name in TEXTS and isinstance(value, tuple):
            changes[field.name] = tuple(map(_expand_text, value))
    return replace(settings, **changes)


def _expand_text(text: str) -> str:
    return str(expand(text)) if text.startswith("~") else text
