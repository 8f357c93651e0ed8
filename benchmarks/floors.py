"""The least time that a machine can take: its copies and products, measured in the same run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.measure import DEVICE, take_turns

COPIED_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes read and written, and operations of matrix products."""

    bytes: float
    flops: float

    def floor(self, dtype: torch.dtype) -> float:
        """Seconds on this machine, with memory and arithmetic at work at the same time."""
        return max(self.bytes / copy_bandwidth(), self.flops / matrix_rate(dtype))


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(COPIED_BYTES[DEVICE], dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() / statistics.median(seconds)


_RATES: dict[torch.dtype, float] = {}


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large square product."""
    if dtype not in _RATES:
        side = MATRIX_SIDE[DEVICE]
        a, b = (torch.ones(side, side, dtype=dtype, device=DEVICE) for _ in range(2))
        out = torch.empty_like(a)
        seconds = take_turns({"product": lambda: torch.mm(a, b, out=out)})["product"]
        _RATES[dtype] = 2 * side**3 / statistics.median(seconds)
    return _RATES[dtype]


def measured() -> dict[str, float]:
    """What was measured so far in this run, for the results."""
    rates = {f"{str(dtype)[6:]} flop/s": rate for dtype, rate in _RATES.items()}
    return {"copied byte/s": copy_bandwidth(), **rates}
