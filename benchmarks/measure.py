"""Seconds and bytes: how a call is timed and its memory read, on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = {"cpu": 15, "cuda": 50}
LEAST_ROUNDS = 3
PATIENCE = {"cpu": 3.0, "cuda": 1.0}  # seconds; a slower contender sits the later rounds out
_CACHE_BYTES = 256 << 20  # more than any GPU's L2


def take_turns(calls: Mapping[str, Call], device: str = DEVICE) -> dict[str, list[float]]:
    """Seconds of each call, over rounds in which all take turns, so that noise meets all alike.

    On a GPU each call is timed by events on the stream, with its L2 cache overwritten before; on a
    CPU by the clock, right after an untimed call that wakes its threads.
    """
    clock = _GpuClock() if device == "cuda" else _cpu_seconds
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS[device]):
        for name, call in calls.items():
            spent = seconds[name]
            if len(spent) < LEAST_ROUNDS or sum(spent) < PATIENCE[device]:
                spent.append(clock(call))
    return seconds


def _cpu_seconds(call: Call) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _GpuClock:
    def __init__(self) -> None:
        self.flush = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        self.flush.zero_()  # it also keeps the GPU busy while the call's kernels are queued
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000


def peak_bytes(call: Call, device: str = DEVICE) -> int | None:
    """The most memory a call holds at once, beyond what was there before and what it returns.

    On a GPU as PyTorch's allocator counts it. On a CPU the process's resident memory, as Linux
    counts it, so that what libraries allocate for themselves is in it; good to about a megabyte.
    None where it cannot be read.
    """
    call()  # what is set up once is not counted
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = call()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - _bytes(returned))
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        before = _resident("VmRSS")
        returned = call()
        return max(0, _resident("VmHWM") - before - _bytes(returned))
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _bytes(returned: object) -> int:
    """Of the distinct storages of the tensors that a call returned."""
    tensors = returned if isinstance(returned, (tuple, list)) else [returned]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
