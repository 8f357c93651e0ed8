"""The modules compute what their functions do."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
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


@pytest.mark.parametrize(
    "width, heads, error, message",
    [
        (12, 5, ValueError, "heads: expected a divisor of the width 12, got 5"),
        (12, 3.0, TypeError, "heads: expected an integer, got float"),
        ("12", 3, TypeError, "width: expected an integer, got str"),
    ],
)
def test_bad_heads(width, heads, error, message) -> None:
    with pytest.raises(error, match=message):
        AxialSelfAttention(width, heads, 0)


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


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"temperature": 1e-9}, ValueError, "temperature: expected an absolute value of at least"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        ({"temperature": torch.nan}, ValueError, "temperature: expected a finite number, got nan"),
        ({"memory_bank_size": (1, 2, 3)}, ValueError, r"memory_bank_size: expected a size, or"),
        ({"memory_bank_size": -1}, ValueError, "memory_bank_size: expected a size, or .* got -1"),
        ({"memory_bank_size": 8.0}, TypeError, "memory_bank_size: expected an integer, got float"),
        ({"memory_bank_size": "8"}, TypeError, "memory_bank_size: expected an integer, got str"),
        ({"memory_bank_size": (8, None)}, TypeError, "memory_bank_size: expected an integer, got"),
        ({"gather_distributed": 1}, TypeError, "gather_distributed: expected True or False, got"),
    ],
)
def test_bad_options(change, error, message) -> None:
    with pytest.raises(error, match=message):
        NTXentLoss(**change)


def test_gathering_takes_torch_distributed(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed: expected torch.distributed in this"):
        NTXentLoss(gather_distributed=True)


Z = torch.ones(6, 5)


@pytest.mark.parametrize("size", [0, 8, (8, 5)])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"out0": None}, TypeError, "out0: expected a tensor, got NoneType"),
        ({"out0": Z.long()}, TypeError, "out0: expected a floating-point tensor"),
        ({"out0": Z[0]}, ValueError, r"out0: expected 2 dimensions \[N, D\], got \[5\]"),
        ({"out0": Z[:0]}, ValueError, r"out0: expected \[N, D\] with at least one image"),
        ({"out1": [1]}, TypeError, "out1: expected a tensor, got list"),
        ({"out1": Z[:4]}, ValueError, r"out1: expected shape of out0 = \[6, 5\], got \[4, 5\]"),
        ({"out1": Z.half()}, TypeError, "out1: expected the dtype of out0"),
        ({"out1": Z.to("meta")}, ValueError, "out1: expected the device of out0"),
    ],
)
def test_bad_views(size, change, error, message) -> None:
    with pytest.raises(error, match=message):
        NTXentLoss(memory_bank_size=size)(**({"out0": Z, "out1": Z} | change))


def test_views_unlike_the_memory_bank() -> None:
    message = r"out1: expected shape \[N, D of the memory bank\] = \[6, 4\], got \[6, 5\]"
    with pytest.raises(ValueError, match=message):
        NTXentLoss(memory_bank_size=(8, 4))(Z, Z)


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


def test_a_batch_may_exceed_the_memory_bank() -> None:
    module = NTXentLoss(memory_bank_size=(2, 5))
    for _ in range(2):
        z1 = torch.randn(3, 5)
        module(torch.randn(3, 5, requires_grad=True), z1)
        torch.testing.assert_close(module.bank, normalize(z1[:2], dim=1))


@pytest.mark.parametrize("size", [8, (8, 5)])
def test_a_saved_state_loads_into_a_new_module(size) -> None:
    trained, new = (NTXentLoss(memory_bank_size=size) for _ in range(2))
    trained(torch.randn(3, 5, requires_grad=True), torch.randn(3, 5))
    assert not trained.state_dict()  # as in lightly
    new.load_state_dict(trained.state_dict())
    assert new(torch.randn(3, 5), torch.randn(3, 5)).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [8, (8, 5)])
def test_a_memory_bank_computes_in_the_accumulation_dtype(size, dtype) -> None:
    z0, z1 = torch.randn(3, 5), torch.randn(3, 5)
    z0[1], z1[2] = 0, 0
    z0, z1 = z0.to(dtype).requires_grad_(), z1.to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(1)
    module = NTXentLoss(0.2, memory_bank_size=size)
    module(torch.randn(3, 5, dtype=exact), torch.randn(3, 5, dtype=exact))  # makes the bank
    bank = module.bank.to(exact, copy=True)
    loss = module(z0, z1)
    unit0, unit1 = (normalize(z.detach().to(exact), dim=1) for z in (z0, z1))
    logits = torch.cat([(unit0 * unit1).sum(1, keepdim=True), unit0 @ bank.T], 1) / 0.2
    torch.testing.assert_close(loss, cross_entropy(logits, torch.zeros(3).long()))
    (gradient,) = torch.autograd.grad(loss, z0)
    assert gradient.dtype == dtype
    assert gradient[z0.detach().any(1)].isfinite().all()
    torch.testing.assert_close(module.bank[:3], unit1.to(module.bank.dtype))


Case = tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]
CASES: dict[str, Case] = {
    "axial": (
        lambda: AxialSelfAttention(12, 3, 0, causal=True),
        lambda n: (torch.randn(2, n, 5, 12),),
    ),
    "color": (
        lambda: ColorCrossEntropyLoss(torch.rand(7, 3), z_loss=0.01),
        lambda n: (torch.randn(n, 5, 7), torch.rand(n, 5, 3), torch.rand(n, 5) > 0.3),
    ),
    "linear color": (
        lambda: LinearColorCrossEntropyLoss(torch.rand(7, 3), reduction="sum"),
        lambda n: (torch.randn(n, 6), torch.randn(7, 6), torch.rand(n, 3), torch.randn(7)),
    ),
    "nt_xent": (lambda: NTXentLoss(0.2), lambda n: (torch.randn(n, 5), torch.randn(n, 5))),
    "memory bank": (
        lambda: NTXentLoss(0.2, memory_bank_size=(24, 5)),
        lambda n: (torch.randn(n, 5), torch.randn(n, 5)),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_modules_compile_whole(case, dynamic, autocast) -> None:
    make, inputs = CASES[case]
    module = make()
    torch._dynamo.reset()
    compiled = torch.compile(deepcopy(module), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (10, 11, 10, 11):  # no size of anything else
        first, *rest = inputs(count)
        first.requires_grad_()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch._dynamo.config.patch(recompile_limit=1 if dynamic else 2),
        ):
            results = [call(first, *rest) for call in (compiled, module)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(r.sum(), first) for r in results))


@pytest.mark.parametrize("case", ["axial", "color", "linear color"])
def test_autocast_casts_what_is_multiplied(case) -> None:
    make, inputs = CASES[case]
    module, (first, *rest) = make(), inputs(4)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(first, *rest)
    if case == "axial":
        module = deepcopy(module).bfloat16()
    elif case == "linear color":
        weight, pixels, bias = rest
        rest = [weight.bfloat16(), pixels, bias.bfloat16()]
    assert torch.equal(result, module(first.bfloat16(), *rest))


@pytest.mark.parametrize("case", ["nt_xent", "memory bank"])
def test_autocast_casts_no_views(case) -> None:
    make, inputs = CASES[case]
    module, (z0, z1) = make(), inputs(4)
    z0.requires_grad_()
    expected = deepcopy(module)(z0, z1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(z0, z1)
        (gradient,) = torch.autograd.grad(loss, z0)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, z0)[0])
