"""What the Triton kernels share: how a program is launched, and what the interpreter needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 values rounded to `dtype`; the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(dtype)
