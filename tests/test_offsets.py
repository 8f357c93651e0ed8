"""What all scores of a row have in common changes no softmax, however large it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gcrl_kernels import (
    axial_attention,
    axial_attention_packed,
    color_cross_entropy,
    info_nce,
    linear_color_cross_entropy,
    nt_xent,
)
from gcrl_kernels.contrastive import ops
from gcrl_kernels.contrastive.reference import OTHERS
from gcrl_kernels.modules import NTXentLoss


@pytest.mark.parametrize("offset", [0.0, 1e4, -2.45e5, 1e6, -1e9, 1e30])
@pytest.mark.parametrize("length", [1, 16, 100])
def test_a_constant_bias_leaves_attention_alone(backend, offset: float, length: int) -> None:
    zeros = torch.zeros(2, length, 3, 8)
    v = torch.ones(2, length, 3, 8, requires_grad=True)
    bias = torch.full((3, length, length), offset, requires_grad=True)
    out, lse = axial_attention(zeros, zeros, v, 0, bias=bias, return_lse=True, backend=backend)
    dv, dbias = torch.autograd.grad(out.sum(), (v, bias))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)
    torch.testing.assert_close(dv.sum(1), torch.full((2, 3, 8), float(length)), rtol=2e-6, atol=0)
    torch.testing.assert_close(dbias, torch.zeros_like(dbias), rtol=0, atol=1e-5)
    exact = torch.tensor(offset).double() + torch.tensor(float(length)).double().log()
    torch.testing.assert_close(lse, exact.float().expand_as(lse), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_bias_with_an_offset_is_the_bias(backend, offset: float) -> None:
    """Scores that the offset does not round: the same numbers, to the last bits."""
    qkv = torch.zeros(2, 20, 3, 4, 16)
    qkv[:, :, 2] = torch.randn(2, 20, 4, 16)
    bias = torch.randint(-40, 40, (4, 20, 20)) / 8.0
    results = []
    for added in (0.0, offset):
        inputs = [qkv.clone().requires_grad_(), (bias + added).requires_grad_()]
        out = axial_attention_packed(inputs[0], 0, bias=inputs[1], backend=backend)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for plain, with_offset in zip(*results, strict=True):
        torch.testing.assert_close(with_offset, plain, rtol=1e-6, atol=1e-6)


def targets_and_logits(offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [40], logits [40, 33] whose multiples of 1/16 an offset does not round."""
    tokens = torch.randint(0, 33, (40,))
    logits = torch.randint(-80, 80, (40, 33)) / 16.0
    return tokens, logits, logits + offset


def assert_relative(actual: Tensor, expected: Tensor, most: float) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= most, f"{error:.3g}"


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e6])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(backend, offset: float, reduction: str, smoothing: float) -> None:
    tokens, logits, shifted = targets_and_logits(offset)
    exact = logits.double().requires_grad_()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    expected = cross_entropy(exact, tokens, **options)
    weights = torch.linspace(0.5, 1.5, 40)[: expected.numel()].view(expected.shape)
    (expected_grad,) = torch.autograd.grad((expected * weights.double()).sum(), exact)

    leaf = shifted.clone().requires_grad_()
    loss = color_cross_entropy(leaf, tokens, backend=backend, **options)
    (grad,) = torch.autograd.grad((loss * weights).sum(), leaf)
    assert_relative(loss, expected, 4e-7)
    assert_relative(grad, expected_grad, 4e-7)

    hidden, weight = shifted.clone().requires_grad_(), torch.eye(33)  # the logits themselves
    bias = torch.zeros(33, requires_grad=True)
    loss = linear_color_cross_entropy(hidden, weight, tokens, bias=bias, backend=backend, **options)
    dhidden, dbias = torch.autograd.grad((loss * weights).sum(), (hidden, bias))
    assert_relative(loss, expected, 4e-7)
    assert_relative(dhidden, expected_grad, 4e-7)
    assert_relative(dbias, expected_grad.sum(0), 2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_large_logits_without_z_loss(backend, smoothing: float) -> None:
    """Beyond 1.8e19 their square is infinite; nobody asked for it."""
    logits = torch.tensor([[3e19, -1e30, 3e19], [1e38, -1e38, 0.0]], requires_grad=True)
    tokens = torch.tensor([0, 0])
    options = {"reduction": "none", "backend": backend}
    loss = color_cross_entropy(logits, tokens, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss, torch.tensor([2.0, 1.0]).log())
    torch.testing.assert_close(grad, torch.tensor([[-0.5, 0, 0.5], [0, 0, 0]]))
    loss, z_term = color_cross_entropy(logits, tokens, z_loss=1e-35, return_z_loss=True, **options)
    torch.testing.assert_close(z_term, torch.tensor([9e3, torch.inf]))


@pytest.mark.parametrize("offset", [0.0, 1024.0, 2.0**18])
def test_contrastive_losses(backend, offset: float) -> None:
    """A feature that all embeddings have in common adds the offset to every score."""
    common = torch.randint(-8, 8, (2, 24, 6)) / 4.0
    both = torch.cat([common, torch.full((2, 24, 1), offset**0.5)], 2)
    exact = both.double()
    for function in (nt_xent, lambda a, b, temperature, **o: info_nce(a, b, logit_scale=1.0, **o)):
        results = []
        for views in (both, exact):
            leaves = [view.clone().requires_grad_() for view in views]
            name = backend if views is both else "reference"
            loss = function(*leaves, temperature=1.0, normalize=False, backend=name)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        for actual, expected in zip(*results, strict=True):
            # The offset's own feature has sums that cancel in its gradient.
            each, exactly = (t if t.dim() == 0 else t[:, :6] for t in (actual, expected))
            assert_relative(each, exactly, 2e-6)


def test_blocks_of_contrastive_losses(backend) -> None:
    """As processes and memory banks put them together: rows against columns."""
    rows, columns = (
        torch.cat([torch.randint(-8, 8, (n, 6)) / 4.0, torch.full((n, 1), 512.0)], 1)
        for n in (20, 50)
    )
    scores = rows.double() @ columns.double().T
    lse = ops.block_lse(rows, columns, None, 1.0, OTHERS, None, backend)
    torch.testing.assert_close(lse.double().sum(0), scores.logsumexp(1), rtol=0, atol=1e-6)
    grad = torch.linspace(0.5, 1.5, 20)
    drows, _ = ops.block_gradient(
        rows, lse, grad, columns, None, None, None, 1.0, OTHERS, None, backend
    )
    expected = (scores.softmax(1) * grad[:, None]) @ columns.double()
    torch.testing.assert_close(drows.double(), expected, rtol=4e-7, atol=1e-6)


def test_a_memory_bank_with_a_small_temperature() -> None:
    """Scores of 1e6, whose difference alone is in the loss."""
    loss = NTXentLoss(temperature=1e-6, memory_bank_size=(8, 4))
    loss.bank = torch.nn.functional.normalize(torch.ones(8, 4), dim=1)
    z = torch.ones(3, 4, requires_grad=True)
    value = loss(z, torch.ones(3, 4))
    torch.testing.assert_close(value, torch.tensor(9.0).log(), rtol=0, atol=0.2)
