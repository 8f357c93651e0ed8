"""Each kernel's contenders: ours on every backend, plain PyTorch, and other people's libraries."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contest import Contender, Function, Unavailable
from benchmarks.measure import DEVICE
from gcrl_kernels import backends

SERVING = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def ours(operator: str, function: Callable[[Any, str], Function]) -> list[Contender]:
    """A contender per backend that serves this device: `function` of a case and a backend."""

    def build(case: Any, backend: str) -> Function:
        try:
            backends.choose(operator, backend, torch.empty(0, device=DEVICE))
        except backends.BackendUnavailableError as reason:
            raise Unavailable(str(reason)) from reason
        return function(case, backend)

    return [
        Contender(f"gcrl_kernels {backend}", lambda case, backend=backend: build(case, backend))
        for backend in backends.IMPLEMENTED[operator]
        if backend in SERVING[DEVICE]
    ]


def compiled(function: Function) -> Function:
    """As torch.compile makes it for these shapes alone."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def needs_gpu(library: str) -> None:
    """Raises Unavailable without a GPU, with the library named."""
    if DEVICE != "cuda":
        raise Unavailable(f"{library} needs a CUDA GPU")


def load(module: str, package: str) -> Any:
    """A peer's module.

    Raises:
        Unavailable: its package is not installed, or does not load here.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # some raise other things than ImportError
        name = (getattr(error, "name", None) or "").partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and name == module.partition(".")[0]
        reason = "is not installed" if missing else f"cannot be imported: {error}"
        raise Unavailable(f"{package} {reason}") from error
