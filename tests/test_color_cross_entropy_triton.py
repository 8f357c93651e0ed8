"""The losses in Triton: on a GPU where there is one, else interpreted; and as compiled."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from color_cross_entropy_kernels import BF16, FP16, FP32, KernelTests, Losses
from torch import Tensor
from triton_interpreter import interpreter

from gcrl_kernels import backends

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
KERNELS = "gcrl_kernels.color_cross_entropy.triton.launchers"


@pytest.fixture(scope="class")
def losses() -> Iterator[Losses]:
    if backends.unavailable("triton") is None:
        yield Losses("triton", "cuda")
        return
    kernels = importlib.import_module(KERNELS)
    with interpreter() as call, pytest.MonkeyPatch.context() as patch:
        for name in ("quantize_colors", "forward", "backward"):
            patch.setattr(kernels, name, partial(call, f"{KERNELS}:{name}"))
        yield Losses("triton", "cpu")


class TestTriton(KernelTests):
    pass


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(
    kernels: Any, colors: int, dtype: torch.dtype, pixels: torch.dtype, palette: torch.dtype
) -> list[Callable[[], None]]:
    """Every kernel; forward as the logits form calls it, and as the linear form does."""
    logits, floats = meta(4096, colors, dtype=dtype), meta(4096)
    longs, mask = (meta(4096, dtype=each) for each in (torch.long, torch.bool))
    targets = meta(4096, 3, dtype=pixels), meta(colors, 3, dtype=palette)
    outputs = floats, floats, floats
    return [
        lambda: kernels.quantize_colors(*targets, longs),
        lambda: kernels.forward(logits, *targets, mask, 0.1, 0.1, *outputs, longs, None),
        lambda: kernels.forward(logits, longs, None, mask, 0.1, 0.1, *outputs, None, logits),
        lambda: kernels.backward(floats, logits, longs, mask, floats, 0.1, 0.1, logits),
    ]


# Architecture, colours, dtypes of the logits, the pixels and the palette.
COMPILED = [
    (80, 512, BF16, torch.uint8, torch.uint8),
    (90, 512, BF16, torch.uint8, torch.int32),
    (90, 4096, FP32, FP32, torch.float64),
    (100, 100, FP16, torch.uint8, FP32),
]


@pytest.mark.parametrize("architecture, colors, dtype, pixels, palette", COMPILED)
def test_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch, architecture, colors, dtype, pixels, palette
) -> None:
    compiler, kernels = (importlib.import_module(name) for name in ("triton_compiler", KERNELS))
    for call in calls(kernels, colors, dtype, pixels, palette):
        (launch,) = compiler.launches(monkeypatch, kernels, call)
        used = compiler.compile_for(architecture, launch)
        assert used.stack == 0, used
        assert used.registers <= 128, used
        assert used.shared <= compiler.MOST_SHARED[architecture], used
