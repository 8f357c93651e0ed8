"""The losses in Triton: on a GPU where there is one, else interpreted; and as compiled."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from color_cross_entropy_kernels import BF16, FP16, FP32, KernelTests, Losses, scene
from test_color_cross_entropy import plain
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
    @pytest.mark.parametrize("offset", [1e4, -1e6])
    def test_what_all_logits_have_in_common_changes_no_gradient(self, losses, offset) -> None:
        """Multiples of 1/16, which it does not round."""
        tokens, logits = torch.randint(0, 33, (40,)), torch.randint(-80, 80, (40, 33)) / 16.0
        exact = logits.double().requires_grad_()
        upstream = torch.linspace(0.5, 1.5, 40)
        expected_loss = plain(exact, tokens, reduction="none")
        (expected,) = torch.autograd.grad(expected_loss, exact, upstream.double())
        leaf = (logits + offset).requires_grad_()
        of_logits = losses.of_logits(leaf, (tokens, None))[0]
        of_linear = losses.of_linear(leaf, torch.eye(33), None, (tokens, None))
        for loss in (of_logits, of_linear):
            (gradient,) = torch.autograd.grad(loss, leaf, upstream)
            for actual, exactly in ((loss, expected_loss), (gradient, expected)):
                error = (actual.double() - exactly).abs().max()
                assert error <= 4e-7 * exactly.abs().max()

    def test_logits_whose_square_is_infinite(self, losses) -> None:
        logits = torch.tensor([[3e19, -1e30, 3e19], [1e38, -1e38, 0.0]], requires_grad=True)
        loss, z_term, *_ = losses.of_logits(logits, (torch.tensor([0, 0]), None))
        torch.testing.assert_close(loss, torch.tensor([2.0, 1.0]).log())
        assert not z_term.any()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0, 0.5], [0, 0, 0]]))

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_a_mask_is_read_as_bytes(self, losses, reduction) -> None:
        """True unless they are 0; and what is masked may hold anything."""
        logits, mask = torch.randn(40, 33), torch.rand(40) > 0.4
        targets, _ = scene(40, 33, "integers")
        bytes_of_mask = (torch.arange(1, 41, dtype=torch.uint8) * mask).view(torch.bool)
        poisoned = logits.masked_fill(~mask[:, None], torch.nan)
        results = []
        for values, each in ((logits, mask), (logits, bytes_of_mask), (poisoned, mask)):
            leaf = values.clone().requires_grad_()
            loss = losses.of_logits(leaf, targets, mask=each, reduction=reduction)[0]
            results.append([loss, *torch.autograd.grad(loss.sum(), leaf)])
        for found in results[1:]:
            assert all(map(torch.equal, found, results[0]))


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(
    kernels: Any, colors: int, dtype: torch.dtype, pixels: torch.dtype, palette: torch.dtype
) -> list[Callable[[], None]]:
    """Every kernel; forward as the logits form calls it, and as the linear form does."""
    logits, floats = meta(4096, colors, dtype=dtype), meta(4096)
    longs, mask = (meta(4096, dtype=each) for each in (torch.long, torch.bool))
    targets = meta(4096, 3, dtype=pixels), meta(colors, 3, dtype=palette)
    outputs = floats, floats, meta(2, 4096)
    return [
        lambda: kernels.quantize_colors(*targets, longs),
        lambda: kernels.forward(logits, *targets, mask, 0.1, 0.1, *outputs, longs, None),
        lambda: kernels.forward(logits, longs, None, mask, 0.1, 0.1, *outputs, None, logits),
        lambda: kernels.backward(floats, logits, longs, mask, outputs[2], 0.1, 0.1, logits),
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
