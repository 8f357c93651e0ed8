"""Which backends exist on this machine, why one does not, and which one serves a given tensor.

A backend that is asked for by name and cannot serve raises; only `None` may choose another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from gcrl_kernels import capability

BACKENDS = ("reference", "cpu", "triton", "cuda")


class Choice(NamedTuple):
    """What `None` takes for an operator on a type of device: the first backend that serves."""

    operator: str
    device: str
    backends: tuple[str, ...]  # best first
    results: str | None = None  # the file under benchmarks/results/ that shows it; None: none does


CHOICES = (
    Choice("axial_attention", "cpu", ("cpu", "reference"), "axial_attention_cpu.json"),
    Choice("axial_attention", "cuda", ("cuda", "triton", "reference")),
    Choice("quantize_colors", "cpu", ("cpu", "reference"), "color_cross_entropy_cpu.json"),
    Choice("quantize_colors", "cuda", ("cuda", "triton", "reference")),
    Choice("color_cross_entropy", "cpu", ("cpu", "reference"), "color_cross_entropy_cpu.json"),
    Choice("color_cross_entropy", "cuda", ("cuda", "triton", "reference")),
    Choice(
        "linear_color_cross_entropy", "cpu", ("cpu", "reference"), "color_cross_entropy_cpu.json"
    ),
    Choice("linear_color_cross_entropy", "cuda", ("cuda", "triton", "reference")),
    Choice("nt_xent", "cpu", ("cpu", "reference"), "contrastive_cpu.json"),
    Choice("nt_xent", "cuda", ("cuda", "triton", "reference")),
    Choice("dcl", "cpu", ("cpu", "reference"), "contrastive_cpu.json"),
    Choice("dcl", "cuda", ("cuda", "triton", "reference")),
    Choice("supcon", "cpu", ("cpu", "reference"), "contrastive_cpu.json"),
    Choice("supcon", "cuda", ("cuda", "triton", "reference")),
    Choice("info_nce", "cpu", ("cpu", "reference"), "contrastive_cpu.json"),
    Choice("info_nce", "cuda", ("cuda", "triton", "reference")),
)

# Operator -> the backends that implement it, on one type of device or another.
IMPLEMENTED: dict[str, tuple[str, ...]] = {
    operator: tuple(
        backend
        for backend in ("triton", "cuda", "cpu", "reference")
        if any(c.operator == operator and backend in c.backends for c in CHOICES)
    )
    for operator in dict.fromkeys(choice.operator for choice in CHOICES)
}
_BEST = {(choice.operator, choice.device): choice.backends for choice in CHOICES}

# Backend -> the type of device whose tensors it serves; the reference serves every one.
_SERVES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

# The compiled libraries; where PyTorch has no CUDA, the CUDA library loads all the same.
LIBRARIES = {
    backend: Path(__file__).parent / f"libgcrl_kernels_{backend}.so" for backend in ("cpu", "cuda")
}
_NEEDS = {"cpu": "a C++ compiler", "cuda": "a C++ compiler and nvcc"}

# Triton compiles for the GPU at hand; our kernels need what came with this one, as bfloat16.
_TRITON_ARCHITECTURES = "8.0+PTX"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve; the message says why."""


def _load(backend: str) -> str | None:
    """Open a compiled library, which registers its operators; the reason if that fails."""
    library = LIBRARIES[backend]
    if not library.exists():
        return (
            f"{library.name} was not built: it takes {_NEEDS[backend]} at installation "
            "(GCRL_KERNELS_BUILD=1 makes a build that cannot be done an error)"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} cannot be loaded: {error.__cause__ or error}"
    return None


def _find_missing() -> dict[str, str]:
    reasons = {backend: _load(backend) for backend in LIBRARIES}
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "the package triton is not installed"
    return {backend: reason for backend, reason in reasons.items() if reason is not None}


# Found once, at import, so that `choose` is no more than look-ups and can be traced.
_MISSING = _find_missing()


def unavailable(backend: str) -> str | None:
    """Why `backend` is not usable on this machine; None if it is.

    Raises:
        ValueError: `backend` is none of `BACKENDS`.
    """
    _check_name(backend)
    if backend in _MISSING:
        return _MISSING[backend]
    if _SERVES.get(backend) == "cuda":
        if torch.version.cuda is None:
            return f"this build of PyTorch ({torch.__version__}) has no CUDA"
        obstacles = [_obstacle(backend, device) for device in gpus()]
        if None not in obstacles:
            return obstacles[0] if obstacles else "no CUDA GPU was found"
    return None


def gpus() -> list[torch.device]:
    """The CUDA GPUs of this machine."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def is_loaded(backend: str) -> bool:
    """Whether the compiled library of `backend`, "cpu" or "cuda", is open, its operators known."""
    return backend in LIBRARIES and backend not in _MISSING


def choose(
    operator: str,
    requested: str | None,
    tensor: torch.Tensor,
    cannot: Callable[[str], str | None] = lambda backend: None,
) -> str:
    """The backend that runs `operator` on `tensor`: `requested`, or the best one if that is None.

    `cannot` says why a backend's kernels do not take these arguments; None where they do.

    Raises:
        ValueError: `requested` is none of `BACKENDS`.
        BackendUnavailableError: it does not implement the operator, is not built, or serves
            another device, other GPUs or other arguments.
    """
    device = tensor.device
    if requested is None:
        for backend in _BEST.get((operator, device.type), ("reference",)):
            if _obstacle(backend, device) is None and cannot(backend) is None:
                return backend
        raise BackendUnavailableError(f"{operator}: no backend serves a tensor on {device.type!r}")
    _check_name(requested)
    if requested not in IMPLEMENTED[operator]:
        implemented = ", ".join(IMPLEMENTED[operator])
        raise BackendUnavailableError(
            f"backend {requested!r} cannot run {operator}: only {implemented} can"
        )
    obstacle = _obstacle(requested, device) or cannot(requested)
    if obstacle is not None:
        raise BackendUnavailableError(f"backend {requested!r} cannot run {operator}: {obstacle}")
    return requested


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(BACKENDS)}, got {backend!r}")


def _obstacle(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of a device; None if it can."""
    if backend == "reference":
        return None
    if backend in _MISSING:
        return _MISSING[backend]
    if _SERVES[backend] != device.type:
        return f"it serves {_SERVES[backend]!r} tensors, got one on {device.type!r}"
    return _obstacle_of_card(backend, device) if device.type == "cuda" else None


def _obstacle_of_card(backend: str, device: torch.device) -> str | None:
    """Why a GPU does not run the kernels of `backend`; None if it does."""
    card = capability.of_card(device)
    compiled = architectures(backend)
    if card is None or capability.runs_on(card, compiled):
        return None
    found = f"this GPU has compute capability {capability.as_text(card)}"
    if backend == "triton":
        return f"{found}, and its kernels need 8.0"
    return f"{found}, and it was compiled for {compiled}"


# A constant to torch.compile, as torch.compiler.assume_constant_result makes it, which takes the
# time to import all of Dynamo.
_obstacle_of_card._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def architectures(backend: str) -> str:
    """What "cuda", or "triton", was compiled for, as GCRL_KERNELS_ARCHITECTURES writes it."""
    if backend == "triton":
        return _TRITON_ARCHITECTURES
    compiled: str = torch.ops.gcrl_kernels_cuda.architectures()
    return compiled


def cpu_levels() -> tuple[str, ...]:
    """The instruction sets the compiled CPU kernels can use here, best first; () if not built."""
    if "cpu" in _MISSING:
        return ()
    return tuple(torch.ops.gcrl_kernels_cpu.cpu_levels().split(","))


@contextmanager
def use_cpu_level(level: str) -> Iterator[None]:
    """Hold the compiled CPU kernels, in the whole process, to one of `cpu_levels()`."""
    levels = cpu_levels()
    if level not in levels:
        raise BackendUnavailableError(f"level: expected one of {levels}, got {level!r}")
    torch.ops.gcrl_kernels_cpu.set_cpu_level(level)
    try:
        yield
    finally:
        torch.ops.gcrl_kernels_cpu.set_cpu_level(levels[0])
