"""The modules compute what their functions do."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from gcrl_kernels import axial_attention, color_cross_entropy, linear_color_cross_entropy, nt_xent
from gcrl_kernels.modules import (
    AxialSelfAttention,
    ColorCrossEntropyLoss,
    LinearColorCrossEntropyLoss,
    NTXentLoss,
)


@pytest.mark.parametrize("axis", [0, 1])
def test_axial_self_attention(axis) -> None:
    torch.manual_seed(0)
    module = AxialSelfAttention(12, 3, axis, causal=True)
    x, mask = torch.randn(2, 4, 5, 12), torch.rand(2, 4, 5) > 0.3
    length = (4, 5)[axis]
    bias = torch.randn(3, length, length)
    q, k, v = (part.unflatten(-1, (3, 4)) for part in module.qkv(x).chunk(3, -1))
    attended = axial_attention(q, k, v, axis, causal=True, bias=bias, mask=mask)
    torch.testing.assert_close(module(x, bias=bias, mask=mask), module.out(attended.flatten(-2)))
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 12, got 5"):
        AxialSelfAttention(12, 5, 0)


def test_color_losses() -> None:
    palette, pixels = torch.rand(7, 3), torch.rand(4, 5, 3)
    hidden, weight, bias = torch.randn(4, 5, 6), torch.randn(7, 6), torch.randn(7)
    mask = torch.rand(4, 5) > 0.5
    options = {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01, "return_z_loss": True}
    logits = hidden @ weight.T
    loss = ColorCrossEntropyLoss(palette, **options)(logits, pixels, mask)
    expected = color_cross_entropy(logits, pixels, palette, mask=mask, **options)
    torch.testing.assert_close(loss, expected)
    loss = LinearColorCrossEntropyLoss(palette, **options)(hidden, weight, pixels, bias, mask)
    expected = linear_color_cross_entropy(
        hidden, weight, pixels, palette, bias=bias, mask=mask, **options
    )
    torch.testing.assert_close(loss, expected)
    tokens = torch.randint(0, 7, (4, 5))
    torch.testing.assert_close(
        ColorCrossEntropyLoss()(logits, tokens), color_cross_entropy(logits, tokens)
    )
    assert "palette" in ColorCrossEntropyLoss(palette).state_dict()


def test_nt_xent_loss() -> None:
    z0, z1 = torch.randn(6, 5), torch.randn(6, 5)
    expected = nt_xent(z0, z1, temperature=0.2)
    torch.testing.assert_close(NTXentLoss(0.2)(z0, z1), expected)
    torch.testing.assert_close(NTXentLoss(0.2, gather_distributed=True)(z0, z1), expected)
    with pytest.raises(
        ValueError, match="temperature: expected an absolute value of at least 1e-8"
    ):
        NTXentLoss(1e-9)
    with pytest.raises(ValueError, match="memory_bank_size: expected a size, or"):
        NTXentLoss(memory_bank_size=(1, 2, 3))


@pytest.mark.parametrize("size", [8, (8, 5)])
def test_memory_bank_holds_the_negatives(size) -> None:
    torch.manual_seed(0)
    module = NTXentLoss(0.2, memory_bank_size=size)
    batches = [[torch.randn(3, 5, requires_grad=True) for _ in range(2)] for _ in range(4)]
    bank = None
    for step, (z0, z1) in enumerate(batches):
        bank_before = None if module.bank.dim() == 1 else module.bank.clone()
        loss = module(z0, z1)
        bank = module.bank
        if bank_before is not None:
            unit0, unit1 = normalize(z0, dim=1), normalize(z1, dim=1)
            logits = torch.cat([(unit0 * unit1).sum(1, keepdim=True), unit0 @ bank_before.T], 1)
            torch.testing.assert_close(loss, cross_entropy(logits / 0.2, torch.zeros(3).long()))
            loss.backward()
            assert z0.grad.abs().sum() > 0
        # Three batches of three fill eight rows, the last of which is dropped; the fourth starts
        # anew.
        first = (0, 3, 6, 0)[step]
        kept = min(3, 8 - first)
        torch.testing.assert_close(bank[first : first + kept], normalize(z1.detach(), dim=1)[:kept])
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(8))
    before = module.bank.clone()
    module(batches[0][0].detach(), batches[0][1])
    assert torch.equal(module.bank, before)  # an evaluation leaves the bank alone
