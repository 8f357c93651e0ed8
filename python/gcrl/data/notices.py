"""What reading images has to say, though it goes on."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def warn(path: Path, text: str) -> None:
    """A line on stderr; of several processes, the first alone says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"gcrl: {path}: {text}", file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """'1 file', '2 files', '1,000 files'."""
    return f"{number:,} {noun}" + "s" * (number != 1)
