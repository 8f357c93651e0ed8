"""Inputs that people have and few try: bytes for bools, NaN behind a mask, NumPy's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gcrl_kernels import (
    axial_attention,
    axial_attention_packed,
    color_cross_entropy,
    dcl,
    fit_palette,
    info_nce,
    linear_color_cross_entropy,
    nt_xent,
    quantize_colors,
    supcon,
)
from gcrl_kernels.modules import AxialSelfAttention, NTXentLoss


def as_bytes(mask: Tensor) -> Tensor:
    """The same mask, whose true bytes are 1 to 255."""
    values = torch.arange(mask.numel()).view(mask.shape).remainder(255).add(1).to(torch.uint8)
    return (values * mask).view(torch.bool)


def attention_results(
    tensors: list[Tensor], bias: Tensor, mask: Tensor, **options: Any
) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (*tensors, bias)]
    out = axial_attention(*leaves[:3], 1, bias=leaves[3], mask=mask, **options)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 17, 80])
@pytest.mark.parametrize("causal", [False, True])
def test_what_masked_keys_hold_reaches_nobody(backend, poison, dtype, width, causal) -> None:
    q, k, v = torch.randn(3, 2, 2, width, 2, 8).to(dtype).unbind()
    bias, mask = torch.randn(2, width, width), torch.rand(2, 2, width) > 0.4
    mask[0, 0] = False  # a row with nothing to attend to
    options = {"causal": causal, "backend": backend}
    expected = attention_results([q, k, v], bias, mask, **options)
    assert all(result.abs().max() > 0 for result in expected)
    poisoned = [t.masked_fill(~mask[..., None, None], poison) for t in (k, v)]
    for actual, clean in zip(
        attention_results([q, *poisoned], bias, mask, **options), expected, strict=True
    ):
        assert torch.equal(actual, clean)
    for actual, clean in zip(
        attention_results([q, k, v], bias, as_bytes(mask), **options), expected, strict=True
    ):
        assert torch.equal(actual, clean)
    packed = torch.stack([q, *poisoned], -3).requires_grad_()
    out = axial_attention_packed(packed, 1, bias=bias, mask=mask, **options)
    assert torch.equal(out, expected[0])
    assert torch.autograd.grad(out.sum(), packed)[0].isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_is_masked_in_a_loss_reaches_nobody(backend, poison, reduction) -> None:
    hidden, weight, bias = torch.randn(50, 12), torch.randn(20, 12), torch.randn(20)
    pixels, palette, mask = torch.rand(50, 3), torch.rand(20, 3), torch.rand(50) > 0.4
    options: dict[str, Any] = {"reduction": reduction, "backend": backend, "z_loss": 0.1}

    def results(hidden: Tensor, mask: Tensor, pixels: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = linear_color_cross_entropy(
            *leaves[:2], pixels, palette, bias=leaves[2], mask=mask, **options
        )
        found = [loss, *torch.autograd.grad(loss.sum(), leaves)]
        logits = (hidden @ weight.T).requires_grad_()
        loss = color_cross_entropy(logits, pixels, palette, mask=mask, **options)
        return [*found, loss, *torch.autograd.grad(loss.sum(), logits)]

    expected = results(hidden, mask, pixels)
    assert all(result.abs().max() > 0 for result in expected)
    poisoned = hidden.masked_fill(~mask[:, None], poison)
    strange_pixels = pixels.masked_fill(~mask[:, None], torch.nan)
    for variant in ((poisoned, mask, strange_pixels), (hidden, as_bytes(mask), pixels)):
        assert all(map(torch.equal, results(*variant), expected))


# NumPy's numbers, and other things that have a number's value


def test_numpy_numbers_are_numbers() -> None:
    q = torch.randn(2, 3, 4, 2, 8)
    expected = axial_attention(q, q, q, 1, scale=0.25)
    for axis, scale in (
        (np.int64(1), np.float32(0.25)),
        (np.array(1), np.array(0.25)),
        (torch.tensor(1), torch.tensor(0.25)),
    ):
        assert torch.equal(axial_attention(q, q, q, axis, scale=scale), expected)
    z0, z1 = torch.randn(2, 6, 4)
    expected = nt_xent(z0, z1, temperature=0.5)
    assert torch.equal(nt_xent(z0, z1, temperature=np.float32(0.5)), expected)
    assert torch.equal(NTXentLoss(np.float16(0.5))(z0, z1), expected)
    logits, tokens = torch.randn(5, 4), torch.arange(5) % 4
    options = {"label_smoothing": np.float32(0.25), "z_loss": np.int64(1)}
    assert torch.equal(
        color_cross_entropy(logits, tokens, **options),
        color_cross_entropy(logits, tokens, label_smoothing=0.25, z_loss=1),
    )
    assert fit_palette(torch.rand(9, 3), np.int32(2), seed=np.uint8(3)).shape == (2, 3)
    assert AxialSelfAttention(np.int64(8), np.int16(2), np.int64(0))(torch.randn(1, 3, 8)).shape
    assert NTXentLoss(memory_bank_size=np.int64(4)).bank_size == 4


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, [1], np.ones(2), torch.ones(2)])
def test_what_has_no_numbers_value_is_none(value) -> None:
    q, z = torch.randn(2, 3, 4, 2, 8), torch.randn(4, 3)
    for call in (
        lambda: axial_attention(q, q, q, value),
        lambda: color_cross_entropy(z, torch.zeros(4, dtype=torch.long), z_loss=value),
        lambda: fit_palette(torch.rand(9, 3), value),
        lambda: fit_palette(torch.rand(9, 3), 2, seed=value),
        lambda: NTXentLoss(memory_bank_size=value if not isinstance(value, list) else [value]),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^\w+: expected an? "):
            call()


def test_seeds_are_of_64_bits() -> None:
    pixels = torch.rand(50, 3)
    for seed in (-(2**63), 2**64 - 1):
        assert fit_palette(pixels, 2, seed=seed).shape == (2, 3)
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(ValueError, match=r"^seed: expected an integer of 64 bits, got"):
            fit_palette(pixels, 2, seed=seed)


# Autocast


def test_autocast_casts_before_it_checks() -> None:
    q = torch.randn(2, 3, 4, 2, 8)
    k, v = q.bfloat16(), q.half()
    half = [t.bfloat16() for t in (q, k, v)]
    z0, z1 = torch.randn(6, 4), torch.randn(6, 4).bfloat16()
    with pytest.raises(TypeError, match=r"^k: expected the dtype of q"):
        axial_attention(q, k, v, 0)
    with pytest.raises(TypeError, match=r"^z1: expected the dtype of z0"):
        nt_xent(z0, z1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(axial_attention(q, k, v, 0), axial_attention(*half, 0))
        for call in (nt_xent, dcl, lambda a, b: info_nce(a, b, logit_scale=2.0), NTXentLoss()):
            assert torch.equal(call(z0, z1), call(z0, z1.float()))
            assert torch.equal(call(z1, z0), call(z1.float(), z0))
        bank = NTXentLoss(memory_bank_size=(8, 4))
        assert bank(z1, z0).dtype == torch.float32
        for z, negatives in ((z0, z1), (z1, z0)):
            expected = supcon(z, torch.arange(6) % 2, negatives=negatives.to(z.dtype))
            assert torch.equal(supcon(z, torch.arange(6) % 2, negatives=negatives), expected)
            assert nt_xent(z, z, negatives=negatives).isfinite()
        hidden, weight = torch.randn(6, 4).bfloat16(), torch.randn(5, 4)
        tokens = torch.arange(6) % 5
        bias = torch.zeros(5, dtype=torch.half)
        assert linear_color_cross_entropy(hidden, weight, tokens, bias=bias).isfinite()
    gradients = torch.autograd.grad
    z0, z1 = z0.requires_grad_(), z1.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z0, z1)
    assert [g.dtype for g in gradients(loss, (z0, z1))] == [torch.float32, torch.bfloat16]


# The module with a memory bank


def test_a_learned_temperature_with_a_memory_bank() -> None:
    z0, z1 = torch.randn(2, 5, 4, dtype=torch.float64)
    loss = NTXentLoss(memory_bank_size=(7, 4)).double()
    bank = loss.bank.clone()
    loss.temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    (grad,) = torch.autograd.grad(loss(z0, z1), loss.temperature)

    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    a, b = (torch.nn.functional.normalize(z, dim=1) for z in (z0, z1))
    logits = torch.cat([(a * b).sum(1, keepdim=True), a @ bank.T], 1) / tau
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(grad, torch.autograd.grad(expected, tau)[0])


@pytest.mark.parametrize("size", [8, (8, 4)])
def test_a_memory_bank_that_began_in_inference_mode_trains(size) -> None:
    with torch.inference_mode():
        loss = NTXentLoss(memory_bank_size=size)
        loss(*torch.randn(2, 3, 4))
    z = torch.randn(3, 4, requires_grad=True)
    for _ in range(4):
        loss(z, torch.randn(3, 4)).backward()
    assert not loss.bank.is_inference()
    assert z.grad is not None


# The edges of what numbers hold


def test_a_scale_of_zero_has_a_gradient(backend) -> None:
    a, b = torch.randn(2, 6, 4)
    for dtype in (torch.float32, torch.float64):
        name = "reference" if dtype == torch.float64 else backend
        scale = torch.zeros((), dtype=dtype, requires_grad=True)
        loss = info_nce(a.to(dtype), b.to(dtype), logit_scale=scale, backend=name)
        (grad,) = torch.autograd.grad(loss, scale)
        s = torch.nn.functional.normalize(a.double()) @ torch.nn.functional.normalize(b.double()).T
        torch.testing.assert_close(grad.double(), s.mean() - s.diagonal().mean())


def test_integer_palettes_of_32_bits(backend) -> None:
    least, most = -(2**31), 2**31 - 1
    palette = torch.tensor(
        [[least, least, least], [most, most, most], [most, most, most - 1], [most, 0, 0],
         [most - 1, 1, 200], [-40_000, 3, 9], [-40_000, 3, 8]], dtype=torch.int32,
    )  # fmt: skip
    pixels = torch.randint(0, 256, (300, 3), dtype=torch.uint8)
    for count in range(1, 8):
        part = palette[:count].roll(1, 0)
        difference = pixels.numpy().astype(object)[:, None] - part.numpy().astype(object)
        expected = (difference**2).sum(-1).argmin(-1)
        for colors in (part, part.long()):
            assert quantize_colors(pixels, colors, backend=backend).tolist() == expected.tolist()


def test_supcon_is_exact_in_float64() -> None:
    z = torch.nn.functional.normalize(torch.randn(12, 5, dtype=torch.float64))
    labels = torch.arange(12) % 3
    scores = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    expected = scores.logsumexp(1) - scores.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)
    torch.testing.assert_close(supcon(z, labels), expected.mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
def test_what_float32_cannot_hold_shows(backend, size: float) -> None:
    """A right number, infinity or NaN; -1 for a colour."""
    q = torch.randn(1, 5, 2, 8)
    out = axial_attention(q, q, q, 0, scale=size, backend=backend)
    exact = axial_attention(q.double(), q.double(), q.double(), 0, scale=size)
    assert ((out - exact).abs() < 1e-5).logical_or(~out.isfinite()).all()
    pixels = torch.tensor([[size, 0, 0], [0, 0, 0], [-size, 1, 1]])
    palette = torch.tensor([[0, 0, 0.0], [-size, 0, 0], [size, size, size]])
    difference = pixels.double()[:, None] - palette.double()
    found = quantize_colors(pixels, palette, backend=backend)
    assert ((found == difference.square().sum(-1).argmin(-1)) | (found == -1)).all()
    assert found[1] == 0
    z0, z1 = torch.randn(2, 6, 4)
    for tau in (1 / size, 0.01 / size):
        loss = nt_xent(z0, z1, temperature=tau, backend=backend)
        true = nt_xent(z0.double(), z1.double(), temperature=tau)
        assert not loss.isfinite() or torch.isclose(loss.double(), true, rtol=1e-4)
        leaves = [z0.clone().requires_grad_(), z0.double().requires_grad_()]
        grad, exactly = (
            torch.autograd.grad(nt_xent(z, z1.to(z), temperature=tau, backend=name), z)[0]
            for z, name in zip(leaves, (backend, "reference"), strict=True)
        )
        close = torch.isclose(grad.double(), exactly, rtol=1e-3, atol=1e-5 / tau)
        assert (close | ~grad.isfinite()).all()


def test_no_features_is_an_error() -> None:
    for call in (
        lambda: linear_color_cross_entropy(
            torch.zeros(3, 0), torch.zeros(5, 0), torch.zeros(3, dtype=torch.long)
        ),
        lambda: axial_attention(*torch.zeros(3, 1, 2, 2, 0), 0),
        lambda: nt_xent(*torch.zeros(2, 3, 0)),
        lambda: color_cross_entropy(torch.zeros(3, 0), torch.zeros(3, dtype=torch.long)),
    ):
        with pytest.raises(ValueError, match=r"^\w+: expected .*at least one"):
            call()
