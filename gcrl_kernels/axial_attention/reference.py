"""Axial attention in plain PyTorch, on any device: the meaning of the kernel, and its fallback.

Along the chosen axis, with rows of length N:

    S = scale Q Kᵀ + bias
    P = softmax(S) over the keys that causal and mask allow
    O = P V

and backward, from dO (Vaswani et al. 2017, arXiv 1706.03762; differentiated by hand):

    dV = Pᵀ dO
    dP = dO Vᵀ
    dS = P ∘ (dP - Σ P ∘ dP)
    dQ = scale dS K         dK = scale dSᵀ Q         dbias = Σ dS
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcrl_kernels.operators import accumulation_dtype, as_bool
from gcrl_kernels.softmax import exponentials, log_sum_exp, softmax


def forward(
    q: Tensor,  # [B, *grid, heads, D]
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,  # [heads, N, N]
    mask: Tensor | None,  # bool [B, *grid]
    axis: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output [B, *grid, heads, D], and [2, B, *grid, heads] of each query.

    That is its log-sum-exp, and what rounding lost of it, which kernels need in backward.
    """
    mask = None if mask is None else as_bool(mask)
    dtype = accumulation_dtype(q.dtype)
    keys, values = (_rows(_without_masked(t, mask), axis, dtype) for t in (k, v))
    scores = _scores(_rows(q, axis, dtype), keys, bias, mask, axis, causal, scale)
    numerators, maximum = exponentials(scores)
    total = numerators.sum(-1)  # [B, *rest, heads, N]
    out = (numerators @ values).div_(torch.where(total == 0, 1.0, total)[..., None])
    lse = log_sum_exp(maximum, total)
    return _grid(out, axis, q.dtype), lse.movedim(-1, 2 + axis).contiguous()


def backward(
    grad: Tensor,  # [B, *grid, heads, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # [2, B, *grid, heads], which the softmax here does without
    bias: Tensor | None,
    mask: Tensor | None,
    axis: int,
    causal: bool,
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv [B, *grid, heads, D] and dbias [heads, N, N] (empty where it is not asked for)."""
    mask = None if mask is None else as_bool(mask)
    dtype = accumulation_dtype(q.dtype)
    inputs = (q, _without_masked(k, mask), _without_masked(v, mask), grad)
    q_rows, k_rows, v_rows, grad_rows = (_rows(t, axis, dtype) for t in inputs)
    p = softmax(_scores(q_rows, k_rows, bias, mask, axis, causal, scale))
    dv = p.mT @ grad_rows
    dp = grad_rows @ v_rows.mT
    ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p)
    dq, dk = ds @ k_rows * scale, ds.mT @ q_rows * scale
    if bias is not None and bias_needs_grad:
        dbias = ds.flatten(0, -4).sum(0).to(bias.dtype)
    else:
        dbias = q.new_empty(0)
    return _grid(dq, axis, q.dtype), _grid(dk, axis, k.dtype), _grid(dv, axis, v.dtype), dbias


def _rows(tensor: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """[B, *grid, heads, D] -> [B, *rest, heads, N, D], contiguous: the rows to attend along."""
    return tensor.movedim(1 + axis, -2).to(dtype).contiguous()


def _grid(rows: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """[B, *rest, heads, N, D] -> [B, *grid, heads, D], contiguous."""
    return rows.to(dtype).movedim(-2, 1 + axis).contiguous()


def _scores(
    q: Tensor,  # [B, *rest, heads, N, D]
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    axis: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """[B, *rest, heads, N, N], minus infinity where a query may not attend to a key."""
    scores = (q @ k.mT).mul_(scale)
    length = scores.shape[-1]
    if bias is not None:
        scores += bias
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(future, -torch.inf)
    if mask is not None:
        keys = mask.movedim(1 + axis, -1)[..., None, None, :]  # [B, *rest, 1, 1, N]
        scores.masked_fill_(~keys, -torch.inf)
    return scores


def _without_masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Keys or values with zeros where they are masked: zero times what is not finite is NaN."""
    return tensor if mask is None else tensor.masked_fill(~mask[..., None, None], 0.0)
