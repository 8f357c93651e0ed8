"""Softmax in plain PyTorch, and a log-sum-exp from which it can be rebuilt exactly.

A float32 holds a large log-sum-exp to no more than its last place; exp(score - lse) then has all of
a row too large or too small by one factor. So what the rounding lost, the residual, is kept beside
it: exp((score - lse) - residual) is a softmax again, whatever is added to all scores of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exponentials(scores: Tensor) -> tuple[Tensor, Tensor]:
    """exp(score - maximum) over the last dimension [..., K], and the maximum [...].

    The maximum is 0 where no score is above minus infinity, so that exponentials are zeros there.
    """
    if scores.shape[-1] == 0:
        return scores.clone(), scores.new_zeros(scores.shape[:-1])
    maximum = scores.amax(-1)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    return (scores - maximum[..., None]).exp_(), maximum


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; zeros in a row whose scores are all minus infinity."""
    numerators, _ = exponentials(scores)
    total = numerators.sum(-1, keepdim=True)
    return numerators.div_(torch.where(total == 0, 1.0, total))


def log_sum_exp(maximum: Tensor, total: Tensor) -> Tensor:
    """[2, ...]: the log-sum-exp and its residual, of a maximum and a sum of exponentials [...]."""
    log_total = total.log()
    lse = maximum + log_total
    return torch.stack([lse, _finite((maximum - lse) + log_total)])


def split(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, ...] in `dtype`: a float64 log-sum-exp [...], rounded, and its residual."""
    rounded = lse.to(dtype)
    return torch.stack([rounded, _finite(lse - rounded.double()).to(dtype)])


def _finite(residual: Tensor) -> Tensor:
    return torch.where(residual.isfinite(), residual, 0.0)
