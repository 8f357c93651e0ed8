"""What the Triton kernels share: how a program is launched, and what the interpreter needs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GENERATIONS = (80, 90, 100)  # that the settings tell apart; 80 stands for all others


class Setting(NamedTuple):
    """The tile of a program, its warps, and in how many stages its loop loads."""

    tile: tuple[int, ...]
    warps: int
    stages: int = 1


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    setting: Setting,
) -> None:
    """On the device of the first argument, in the grid's first dimension."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](
            *arguments, **constants, num_warps=setting.warps, num_stages=setting.stages
        )


def padded(size: int) -> int:
    """To a power of two that the tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as the bytes that it is, of which some may be neither 0 nor 1."""
    return None if mask is None else mask.view(torch.uint8)


@lru_cache
def generation(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 90
    return {9: 90, 10: 100, 11: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 values rounded to `dtype`; the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


@triton.jit
def dot(a, b, initial, PRECISION: tl.constexpr):
    """initial + a b in float32.

    The interpreter's own product is wrong in half precision, and in float32 it depends on the place
    in the tile: from float64 it is rounded to the same number everywhere, as a GPU sums it alike.
    """
    if INTERPRETED:
        exact = initial.to(tl.float64)
        exact = tl.dot(a.to(tl.float64), b.to(tl.float64), exact, out_dtype=tl.float64)
        return exact.to(tl.float32)
    return tl.dot(a, b, initial, input_precision=PRECISION)


@triton.jit
def rounded(a, b, c):
    """a b + c, rounded once, and the same in every kernel.

    What is subtracted from a product may else be fused with it, in one kernel and not in another;
    then a softmax would not fit the log-sum-exp that it is rebuilt from.
    """
    return tl.fma(a, b, c)


@triton.jit
def two_sum(a, b):
    """a + b, and exactly what its rounding lost (Knuth's two-sum); 0 where that is not finite."""
    total = a + b
    added = total - a
    lost = (a - (total - added)) + (b - added)
    return total, tl.where(lost == lost, lost, 0.0)
