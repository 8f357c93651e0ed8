"""How fast the nearest palette colour is found, beside FAISS and torch.cdist on the same inputs.

    pytest benchmarks/bench_color_cross_entropy.py --benchmark-json benchmarks/results/NAME.json

prints, for each kind of pixels, the median time of every contender and how many times as long as
ours it takes. The contenders take turns within one run, and each is checked before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gcrl_kernels import backends, quantize_colors

PIXELS, COLORS, ROUNDS = 131_072, 512, 15
PATIENCE = 2.0  # seconds, after which a slow contender sits out the rounds that are left
Contenders = dict[str, Callable[[], Tensor]]


def inputs(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Pixels [PIXELS, 3] and a palette [COLORS, 3], both in 0..255."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        pixels = torch.randint(0, 256, (PIXELS, 3), dtype=dtype, generator=generator)
        palette = torch.randint(0, 256, (COLORS, 3), dtype=torch.int32, generator=generator)
    else:
        pixels = torch.rand(PIXELS, 3, dtype=dtype, generator=generator) * 255
        palette = torch.rand(COLORS, 3, dtype=dtype, generator=generator) * 255
    return pixels.to(device), palette.to(device)


def contenders(pixels: Tensor, palette: Tensor) -> Contenders:
    """Ours on each backend that serves the device, best first, then the peers."""

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: quantize_colors(pixels, palette, backend=backend)

    calls: Contenders = {}
    for backend in backends.IMPLEMENTED["quantize_colors"]:
        try:
            backends.choose("quantize_colors", backend, pixels)
        except backends.BackendUnavailableError:
            continue
        calls[f"gcrl_kernels {backend}"] = ours(backend)
    # The peers know floats alone; converting for them is not timed.
    x, c = pixels.float(), palette.float()
    calls["torch.cdist"] = lambda: torch.cdist(x, c).argmin(1)
    if not pixels.is_cuda:
        faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
        index = faiss.IndexFlatL2(3)
        index.add(c.numpy())
        calls["FAISS"] = lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    return calls


def check(nearest: Tensor, pixels: Tensor, palette: Tensor) -> None:
    """The chosen colours are nearest, to what float32 makes of |x|² - 2x·c + |c|²."""
    every = torch.cdist(pixels.double(), palette.double()).square()
    chosen = every.gather(1, nearest[:, None])[:, 0]
    assert (chosen - every.amin(1)).max() <= 8 * torch.finfo(torch.float32).eps * 3 * 255**2


def median_seconds(calls: Contenders) -> dict[str, float]:
    """Of each contender, over rounds in which all take turns."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if sum(seconds[name]) > PATIENCE:
                continue
            call()  # untimed: its threads wake, and those of the one before it go to sleep
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float32", "uint8"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.benchmark(group="quantize_colors")
def test_quantize_colors(benchmark, capsys, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    pixels, palette = inputs(dtype, device)
    calls = contenders(pixels, palette)
    for call in calls.values():
        check(call(), pixels, palette)
    medians = median_seconds(calls)
    best = next(iter(medians))
    lines = [f"{PIXELS:,} {dtype} pixels, {COLORS} colours, {torch.get_num_threads()} CPU threads"]
    for name, median in medians.items():
        lines.append(f"  {name:<24}{median * 1e3:9.2f} ms  {median / medians[best]:7.2f}x")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    benchmark.extra_info.update({name: median * 1e3 for name, median in medians.items()})
    benchmark(calls[best])
