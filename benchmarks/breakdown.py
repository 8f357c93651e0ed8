"""Where the time of a training step goes: the share of each operation, as torch.profiler saw it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.measure import DEVICE

OPTIMIZER, REST = "clipping and AdamW", "linear layers and the rest"
# The model's name of an operation -> what its share is called.
OUR_OPERATIONS = {
    "axial_attention_packed": "attention",
    "linear_color_cross_entropy": "colour cross-entropy",
    "nt_xent": "NT-Xent",
}
# What stays recognisable in a compiled step: operators that the compiler leaves whole.
_OPERATORS = {
    "gcrl_kernels::axial_attention": "attention",
    "aten::_scaled_dot_product": "attention",
    "aten::scaled_dot_product": "attention",
    "gcrl_kernels::linear_color_cross_entropy": "colour cross-entropy",
    "gcrl_kernels::contrast": "NT-Xent",
}
_STEP = "step"


def backward_too(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function whose time, and its backward's, is a range of that name in the profiler."""

    def ranged(*arguments: Any, **options: Any) -> Tensor:
        with record_function(name):
            ranges: list[Any] = []
            values = [*arguments, *options.values()]
            tensors = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
            marked = iter(_BackwardEnds.apply(ranges, *tensors))
            values = [
                next(marked) if isinstance(v, Tensor) and v.requires_grad else v for v in values
            ]
            positional, named = values[: len(arguments)], values[len(arguments) :]
            out = function(*positional, **dict(zip(options, named, strict=True)))
            return _BackwardBegins.apply(name, ranges, out)

    return ranged


class _BackwardEnds(torch.autograd.Function):
    """Identity; in backward, when all the gradients have come, the range ends."""

    @staticmethod
    def forward(ctx: Any, ranges: list[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranges = ranges
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.ranges.pop().__exit__(None, None, None)
        return None, *gradients


class _BackwardBegins(torch.autograd.Function):
    """Identity; in backward the range begins."""

    @staticmethod
    def forward(ctx: Any, name: str, ranges: list[Any], out: Tensor) -> Tensor:
        ctx.name, ctx.ranges = name, ranges
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.ranges.append(record_function(ctx.name))
        ctx.ranges[-1].__enter__()
        return None, None, gradient


def shares(call: Callable[[], Any]) -> dict[str, float]:
    """Each part's share of a call, profiled once: of its time, or of its kernels' on a GPU.

    A part of which the profiler saw nothing is left out, and its time is in the rest.
    """
    activities = [ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(ProfilerActivity.CUDA)
    call()
    _synchronize()
    with profile(activities=activities) as profiled:
        with record_function(_STEP):
            call()
        _synchronize()
    events = [event for event in profiled.events() if event.device_type == DeviceType.CPU]
    spent = kernel_times(events) if DEVICE == "cuda" else times(events)
    total = spent.pop(_STEP)
    parts = [part for part in (*OUR_OPERATIONS.values(), OPTIMIZER) if part in spent]
    found = {part: spent[part] / total for part in parts}
    return {**found, REST: 1 - sum(found.values())}


def times(events: Iterable[Any]) -> dict[str, float]:
    """The time of each part and of the step, from the profiler's events of the CPU."""
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.name == _STEP:
            spent[_STEP] += event.cpu_time_total
        elif _part(event.name) and _outermost(event.cpu_parent) is None:
            spent[_part(event.name)] += event.cpu_time_total
    return spent


def kernel_times(events: Iterable[Any]) -> dict[str, float]:
    """The time of the kernels that each part launched, and of all.

    A range launches none itself: what the profiler shows as its kernel is the range on the GPU.
    """
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if not event.is_user_annotation:
            seconds = sum(kernel.duration for kernel in event.kernels)
            spent[_STEP] += seconds
            spent[_outermost(event) or REST] += seconds
    return spent


def _outermost(event: Any) -> str | None:
    """The part that an event is in: the outermost one, as parts call each other's operators."""
    part = None
    while event is not None:
        part = _part(event.name) or part
        event = event.cpu_parent
    return part


def _part(name: str) -> str | None:
    if name == OPTIMIZER or name in OUR_OPERATIONS.values():
        return name
    return next((part for start, part in _OPERATORS.items() if name.startswith(start)), None)


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
