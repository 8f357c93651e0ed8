"""Axial attention in Triton: on a GPU where there is one, else interpreted; and as compiled."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from axial_attention_kernels import DTYPES, Attention, Kernels, Machine, check
from comparison import assert_as_accurate
from test_axial_attention import images, plain
from torch import Tensor
from triton_interpreter import interpreter

from gcrl_kernels import backends
from gcrl_kernels.axial_attention import ops

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
KERNELS = "gcrl_kernels.axial_attention.triton.launchers"
OPERATORS = {"axial_attention": "forward", "axial_attention_backward": "backward"}
FP32, FP16, BF16 = DTYPES


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if backends.unavailable("triton") is None:
        kernels = importlib.import_module(KERNELS)
        operators = {name: getattr(kernels, of) for name, of in OPERATORS.items()}
        yield Machine(SimpleNamespace(**operators), "cuda")
        return
    with interpreter() as call:
        operators = {name: partial(call, f"{KERNELS}:{of}") for name, of in OPERATORS.items()}
        yield Machine(SimpleNamespace(**operators), "cpu")


class TestKernels(Kernels):
    """In the interpreter, or on a GPU."""


# Every kernel, rows that fill their tiles and rows that do not, every layout and dtype.
CASES = [
    ((1,), 0, 16, 1, FP32, "contiguous", ""),
    ((5, 3), 0, 24, 3, BF16, "packed", "causal bias mask"),
    ((8,), 0, 128, 2, FP16, "turned", "bias"),
    ((3, 16), 1, 32, 4, BF16, "contiguous", "causal"),
    ((17, 2), 0, 64, 3, FP32, "sliced", "mask"),
    ((2, 17, 2), 1, 40, 1, FP16, "misaligned", "causal bias mask"),
    ((2, 5, 3), 1, 16, 2, FP32, "turned", "bias mask"),
    ((2, 5, 3), 2, 16, 2, BF16, "sliced", "bias mask"),
    ((32, 3), 0, 64, 2, BF16, "packed", ""),
    ((32, 2), 0, 16, 6, FP32, "turned", "causal bias"),
    ((32,), 0, 96, 3, BF16, "packed", "bias mask"),
    ((32,), 0, 128, 1, FP32, "packed", "bias"),
    ((40, 2), 0, 24, 2, FP16, "packed", "bias mask"),
    ((64,), 0, 64, 2, BF16, "packed", "causal"),
    ((64,), 0, 128, 1, FP32, "sliced", "bias mask"),
    ((2, 50), 1, 72, 1, BF16, "turned", "causal mask"),
    ((100,), 0, 64, 2, BF16, "packed", "causal bias"),
    ((128,), 0, 64, 1, FP16, "contiguous", "bias mask"),
    ((97,), 0, 32, 2, FP32, "misaligned", "causal"),
    ((100,), 0, 128, 1, BF16, "packed", "causal bias mask"),
    ((130, 2), 0, 64, 1, BF16, "sliced", "mask"),
    ((257,), 0, 40, 1, FP32, "contiguous", "bias"),
    ((300,), 0, 24, 1, FP16, "misaligned", "causal bias mask"),
    ((256,), 0, 32, 1, BF16, "contiguous", "causal bias"),
]


@pytest.mark.parametrize("grid, axis, features, heads, dtype, layout, given_options", CASES)
def test_as_accurate_as_pytorch(
    machine, grid, axis, features, heads, dtype, layout, given_options
) -> None:
    batch = 2 if len(grid) == 3 else 1
    inputs = images(*grid, batch=batch, heads=heads, features=features)
    options: dict[str, Any] = {"axis": axis, "causal": "causal" in given_options}
    if "bias" in given_options:
        inputs.append(torch.randn(heads, grid[axis], grid[axis]))
    if "mask" in given_options:
        options["mask"] = torch.rand(batch, *grid) > 0.4
    check(machine, inputs, dtype, layout, **options)


def results(machine: Machine, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = Attention(*machine, **options)(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
@pytest.mark.parametrize("length", [6, 32, 70, 140])
def test_what_masked_keys_hold_reaches_nobody(machine, length, poison) -> None:
    """And a mask's bytes are true unless they are 0."""
    q, k, v = images(length, 2, batch=1, heads=1, features=24)
    bias, mask = torch.randn(1, length, length), torch.rand(1, length, 2) > 0.4
    mask[0, :, 1] = False
    poisoned = [tensor.masked_fill(~mask[..., None, None], poison) for tensor in (k, v)]
    options = {"axis": 0, "causal": length == 70}
    expected = results(machine, [q, k, v, bias], mask=mask, **options)
    found = results(machine, [q, *poisoned, bias], mask=mask, **options)
    assert all(map(torch.equal, found, expected))
    true_bytes = torch.arange(mask.numel(), dtype=torch.uint8).view(mask.shape) + 1
    mask = (true_bytes * mask).view(torch.bool)
    found = results(machine, [q, k, v, bias], mask=mask, **options)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("offset", [-2.45e5, -1e6, -1e9, 1e30])
@pytest.mark.parametrize("length", [16, 100, 140])
def test_a_constant_bias_leaves_attention_alone(machine, length, offset) -> None:
    zeros = torch.zeros(1, length, 1, 16, requires_grad=True)
    v = torch.ones(1, length, 1, 16, requires_grad=True)
    bias = torch.full((1, length, length), offset, requires_grad=True)
    out = Attention(*machine, axis=0)(zeros, zeros, v, bias)
    dv, dbias = torch.autograd.grad(out.sum(), (v, bias))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)
    torch.testing.assert_close(dv.sum(1), torch.full((1, 1, 16), float(length)), rtol=2e-6, atol=0)
    torch.testing.assert_close(dbias, torch.zeros_like(dbias), rtol=0, atol=1e-5)


def test_packed_operator(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels write into slices of the packed gradient."""
    kernels = importlib.import_module(KERNELS)
    monkeypatch.setattr(kernels, "forward", machine.library.axial_attention)
    monkeypatch.setattr(kernels, "backward", machine.library.axial_attention_backward)
    q, k, v = images(4, 6, heads=2, features=16)
    bias = torch.randn(2, 6, 6)

    def ours(qkv: Tensor, bias: Tensor) -> Tensor:
        qkv, bias = qkv.to(machine.device), bias.to(machine.device)
        out, _ = ops.packed_forward(qkv, bias, None, 1, True, 0.25, "triton")
        return out.cpu()

    def unpacked(qkv: Tensor, bias: Tensor) -> Tensor:
        return plain(*qkv.unbind(3), bias, axis=1, causal=True, scale=0.25)

    assert_as_accurate(ours, unpacked, [torch.stack([q, k, v], 3), bias], FP16)


def test_partial_sums_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module(KERNELS)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 100_000)
    setting = kernels.Setting((64,), 4)
    for heads, length, parts in ((8, 32, 2048), (8, 1000, 2), (32, 1024, 1)):
        dbias = torch.empty(heads, length, length, device="meta")
        assert len(kernels.shares(dbias, 10_000, heads, setting)) == parts
        assert len(kernels.shares(dbias, 1, heads, setting)) == 1


@pytest.mark.parametrize(
    "axis, lines, sizes", [(0, 2, (15, 1)), (1, 2, (5, 1)), (2, 1, (1, 1))], ids=str
)
def test_lines_are_merged_where_strides_allow_it(axis, lines, sizes) -> None:
    """And the strides divided by as much as the loads can be wide."""
    kernels = importlib.import_module(KERNELS)
    tensor = torch.empty(2, 4, 3, 5, 3, 2, 24, dtype=BF16, device="meta")
    q, k, v = tensor.unbind(-3)
    rows = kernels.arrange((q, k, v), None, axis)
    assert (rows.line_dims, rows.sizes) == (lines, sizes)
    assert rows.lines * rows.length * 2 * 24 == q.numel()
    assert rows.unit == 8
    assert rows.strides[0][4] * 8 == q.stride(1 + axis)
    assert kernels.arrange((q[..., 1:17], k[..., 4:20]), None, axis).unit == 8
    assert kernels.arrange((q.mT, k), None, axis).unit == 1


def test_tf32_where_pytorch_allows_it() -> None:
    kernels = importlib.import_module(KERNELS)
    q = torch.empty(2, 4, 3, 16, device="meta")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for allowed, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = allowed
            assert kernels.arrange((q,), None, 0).precision == expected
            assert kernels.arrange((q.half(),), None, 0).precision == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# Length, features, dtype, with a bias, its gradient, a mask and causality: a sample of the table.
COMPILED = [
    (80, 32, 64, BF16, False),
    (80, 100, 32, FP16, True),
    (90, 32, 64, BF16, True),
    (90, 64, 64, BF16, False),
    (90, 256, 128, BF16, False),
    (90, 16, 64, FP32, True),
    (100, 64, 128, BF16, True),
]


@pytest.mark.parametrize("architecture, length, features, dtype, everything", COMPILED)
def test_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch, architecture, length, features, dtype, everything
) -> None:
    compiler, kernels = (importlib.import_module(name) for name in ("triton_compiler", KERNELS))
    monkeypatch.setattr(kernels, "generation", lambda device: architecture)
    calls = columns(kernels, length, features, dtype, everything)
    for call in calls:
        launches = compiler.launches(monkeypatch, kernels, call)
        assert launches
        for launch in launches:
            used = compiler.compile_for(architecture, launch)
            assert used.stack == 0, used
            assert used.shared <= compiler.MOST_SHARED[architecture], used


def columns(
    kernels: Any, length: int, features: int, dtype: torch.dtype, everything: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of packed rows down the columns of images."""
    heads, size = 8, (16, length, 48)

    def packed() -> tuple[Tensor, ...]:
        return torch.empty(*size, 3, heads, features, dtype=dtype, device="meta").unbind(-3)

    out = torch.empty(*size, heads, features, dtype=dtype, device="meta")
    lse = torch.empty(2, *size, heads, device="meta")
    bias = torch.empty(heads, length, length, device="meta") if everything else None
    mask = torch.empty(size, dtype=torch.bool, device="meta") if everything else None
    options = (bias, mask, 0, everything, 1.0)
    return (
        lambda: kernels.forward(*packed(), *options, out, lse),
        lambda: kernels.backward(out, *packed(), out, lse, *options, *packed(), bias),
    )
