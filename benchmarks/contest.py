"""A contest: implementations of one thing on the same inputs, checked, then timed in turns."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import Work
from benchmarks.measure import DEVICE, peak_bytes, take_turns

PASSES = ("forward", "forward+backward")
PLAIN = "PyTorch"  # the contender whose error the others' is compared with
AGAIN = " (again)"  # the first contender once more: how far equal things differ in this run


class Unavailable(Exception):
    """A contender cannot take part here; the message says why."""


class Case(ABC):
    """One set of inputs that an operation is measured on; equal cases are the same inputs."""

    dtype: torch.dtype

    @property
    def precision(self) -> torch.dtype:
        """The dtype whose roundings are forgiven, and whose matrix rate makes the floor."""
        return self.dtype

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What sets the case apart from the others, for the results."""

    @abstractmethod
    def inputs(self) -> Sequence[Tensor]:
        """What contenders are called with, leaves; those that require grad get a gradient."""

    @abstractmethod
    def upstream(self) -> Tensor:
        """The gradient of the output."""

    @abstractmethod
    def exact(self, way: str) -> Sequence[Tensor]:
        """The output and, for forward+backward, the inputs' gradients, computed in float64."""

    def part(self, index: int) -> str:
        """What `exact` has at an index, where an error is told of."""
        return "the output" if index == 0 else f"gradient {index}"

    def allowed(self, plain: float | None) -> float:
        """How far a value may be off: twice plain PyTorch's error (None: unknown), or roundings."""
        few = 8 * torch.finfo(self.precision).eps
        return few if plain is None else max(few, 2 * plain)

    def comparable(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What of a contender's output and gradients is compared with `exact`."""
        return outputs

    @abstractmethod
    def work(self, way: str) -> Work:
        """What no implementation can do without."""


Function = Callable[..., Tensor]


class Whole(ABC):
    """A contender that is no function of a case's inputs: what is timed is a call of it."""

    @abstractmethod
    def __call__(self) -> Any: ...

    @abstractmethod
    def check(self) -> Sequence[Tensor]:
        """What is compared with the case's exact values."""

    def extra(self, seconds: float) -> dict[str, Any]:
        """What else the results have of it, found out after the timing; its median is given."""
        return {}


@dataclass(frozen=True)
class Contender:
    """A name, and what makes the function of a case's inputs; that raises Unavailable if it must.

    The function's result has the shape of the exact output. What is made may also be a Whole.
    """

    name: str
    build: Callable[[Any], Function | Whole]
    # What it computes where that is not what the case asks: a float64 function of case and way.
    exact: Callable[[Any, str], Sequence[Tensor]] | None = None
    yardstick: bool = False  # it is timed beside the others and not checked


@dataclass
class Outcome:
    """What became of a contender: "ok" with its times, "wrong", "failed" or "skipped", and why."""

    status: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: float | None = None  # relative to float64, the worst of output and gradients
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def hold(case: Case, way: str, contenders: Sequence[Contender]) -> dict[str, Outcome]:
    """Check every contender of a case, then time those that are right in turns."""
    torch.compiler.reset()
    inputs, upstream = case.inputs(), case.upstream()
    exact = case.exact(way)
    calls: dict[str, Callable[[], Any]] = {}
    outcomes: dict[str, Outcome] = {}
    plain_error: list[float] | None = None
    for contender in sorted(contenders, key=lambda c: c.name != PLAIN):
        name = contender.name
        try:
            made = contender.build(case)
            call = made if isinstance(made, Whole) else _call(made, inputs, upstream, way)
            outputs = case.comparable(made.check() if isinstance(made, Whole) else call())
            expected = contender.exact(case, way) if contender.exact else exact
            errors = [] if contender.yardstick else relative_errors(outputs, expected)
        except (Unavailable, ImportError) as reason:
            outcomes[name] = Outcome("skipped", str(reason))
            continue
        except Exception as error:
            outcomes[name] = Outcome("failed", _first_line(error))
            continue
        if name == PLAIN:
            plain_error = errors
        worst = max(errors, default=None)
        if wrong := what_is_wrong(errors, plain_error, case):
            outcomes[name] = Outcome("wrong", wrong, error=worst)
            continue
        outcomes[name] = Outcome("ok", error=worst, peak_bytes=peak_bytes(call))
        calls[name] = call
    del exact
    calls = {c.name: calls[c.name] for c in contenders if c.name in calls}
    if calls:
        first, call = next(iter(calls.items()))
        outcomes[first + AGAIN] = Outcome("ok")
        for name, seconds in take_turns({**calls, first + AGAIN: call}).items():
            outcomes[name].seconds = seconds
    for name, call in calls.items():
        if isinstance(call, Whole):
            outcomes[name].extra = call.extra(outcomes[name].median)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return outcomes


def noise(outcomes: dict[str, Outcome]) -> float:
    """By how much the same implementation, timed twice in turns, differed: 0.02 is 2%."""
    for name, outcome in outcomes.items():
        if name.endswith(AGAIN):
            return abs(math.log(outcome.median / outcomes[name.removesuffix(AGAIN)].median))
    return math.nan


def relative_errors(values: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """|value - exact| / |exact| of each, in the Euclidean norm; infinite if shapes differ."""
    errors = []
    for value, expected in zip(values, exact, strict=True):
        if value.shape != expected.shape:
            errors.append(math.inf)
            continue
        error = float((value.double() - expected).norm() / expected.double().norm())
        errors.append(error if math.isfinite(error) else math.inf)
    return errors


def what_is_wrong(errors: Sequence[float], plain: Sequence[float] | None, case: Case) -> str | None:
    """The first error that is larger than the case allows, in words."""
    for index, error in enumerate(errors):
        allowed = case.allowed(None if plain is None else plain[index])
        if not error <= allowed:
            return f"{case.part(index)} is {error:.2g} off, {allowed:.2g} is allowed"
    return None


def _call(
    function: Function, inputs: Sequence[Tensor], upstream: Tensor, way: str
) -> Callable[[], Sequence[Tensor]]:
    leaves = [tensor for tensor in inputs if tensor.requires_grad]

    alone = [tensor.detach() for tensor in inputs]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return (function(*alone),)

    def both() -> Sequence[Tensor]:
        output = function(*inputs)
        return (output.detach(), *torch.autograd.grad(output, leaves, upstream))

    return forward if way == PASSES[0] else both


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300]
