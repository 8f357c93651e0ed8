"""GCRL: one axial transformer that predicts images pixel by pixel and contrasts their views.

`gcrl.load("runs/digits")` is a trained run, with encode, log_prob, sample and complete.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcrl.config import Config
    from gcrl.run import Run, load

__all__ = ["Config", "Run", "load"]

try:
    __version__ = version("gcrl-kernels")
except PackageNotFoundError:  # used from its source folder
    __version__ = "0+unknown"

_HOMES = {"Config": "gcrl.config", "Run": "gcrl.run", "load": "gcrl.run"}


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `import gcrl` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'gcrl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
