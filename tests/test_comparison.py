"""The gate for numbers lets through what only rounds otherwise, and nothing that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comparison import assert_as_accurate
from torch import Tensor
from torch.nn.functional import cross_entropy

TOKENS = torch.arange(40) % 30


def logits(offset: float = 0.0) -> list[Tensor]:
    return [torch.randn(40, 30) * 3 + offset]


def plain(logits: Tensor) -> Tensor:
    return cross_entropy(logits, TOKENS, reduction="none")


class Rebuilt(torch.autograd.Function):
    """Its softmax is rebuilt from the log-sum-exp, as kernels do, and `wrong` done to it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wrong: Callable[[Tensor], Tensor], keep: bool) -> Tensor:
        exact = logits.double().logsumexp(1, keepdim=True)
        lse = exact.float()
        ctx.wrong, ctx.rest = wrong, (exact - lse.double()).float() * keep
        ctx.save_for_backward(logits, lse)
        return (exact - logits.double().gather(1, TOKENS[:, None]))[:, 0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, lse = ctx.saved_tensors
        softmax = ctx.wrong(((logits.float() - lse) - ctx.rest).exp())
        softmax[torch.arange(len(TOKENS)), TOKENS] -= 1
        return (grad[:, None] * softmax).to(logits.dtype), None, None


def rebuilt(wrong: Callable[[Tensor], Tensor] = Tensor.clone, keep: bool = True) -> Any:
    return lambda logits: Rebuilt.apply(logits, wrong, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_what_rounds_otherwise_passes(dtype: torch.dtype, offset: float) -> None:
    assert_as_accurate(rebuilt(), plain, logits(offset), dtype)
    assert_as_accurate(plain, plain, logits(offset), dtype)


def one_term(softmax: Tensor) -> Tensor:
    softmax = softmax.clone()
    softmax[3, 4] += 1e-3 * softmax[3].max()
    return softmax


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum": lambda softmax: softmax * (1 + 1e-3),
    "a term": one_term,
    "a sign": lambda softmax: -softmax,
    "a row": lambda softmax: softmax.roll(1, 0),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_does_not_pass(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="gradient of input 0: error"):
        assert_as_accurate(rebuilt(wrong), plain, logits(), torch.float32)


def test_a_rounded_log_sum_exp_shows() -> None:
    with pytest.raises(AssertionError, match="gradient of input 0: error"):
        assert_as_accurate(rebuilt(keep=False), plain, logits(1000.0), torch.float32)


def test_small_gradients_are_not_measured_by_large_ones() -> None:
    """A factor's gradient is a thousand times the others'."""
    inputs = [*logits(), torch.tensor(1.0)]

    def scaled(logits: Tensor, factor: Tensor, function: Any = plain) -> Tensor:
        return function(logits) * factor * 1000

    assert_as_accurate(partial(scaled, function=rebuilt()), scaled, inputs, torch.float32)
    ours = partial(scaled, function=rebuilt(one_term))
    with pytest.raises(AssertionError, match="gradient of input 0: error"):
        assert_as_accurate(ours, scaled, inputs, torch.float32)
