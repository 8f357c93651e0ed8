"""From kernels that write into given tensors to what the operators need, packed form included.

Such a kernel has two functions, the same for every backend:

    forward(q, k, v, bias, mask, axis, causal, scale, out, lse)
    backward(grad, q, k, v, out, lse, bias, mask, axis, causal, scale, dq, dk, dv, dbias)

All tensors but the mask have a last stride of 1; bias and dbias are float32 [heads, N, N],
contiguous, lse is float32 [2, B, *grid, heads], contiguous: the log-sum-exps, then what their
rounding to float32 lost, 0 where one is not finite. dbias is None where nobody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Kernel = Callable[..., None]


class Implementation(NamedTuple):
    """What a backend does for each of the operators."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    packed_forward: Callable[..., tuple[Tensor, Tensor]]
    packed_backward: Callable[..., tuple[Tensor, Tensor]]


def implementation(kernel_forward: Kernel, kernel_backward: Kernel) -> Implementation:
    """Outputs are allocated here; a packed tensor's parts are views, its gradient's as well."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        out = q.new_empty(q.shape)
        lse = q.new_empty((2, *q.shape[:-1]), dtype=torch.float32)
        q, k, v = (_readable(tensor) for tensor in (q, k, v))
        kernel_forward(q, k, v, _plain(bias), *options, out, lse)
        return out, lse

    def fill(
        grad: Tensor,
        parts: tuple[Tensor, ...],  # q, k, v
        gradients: tuple[Tensor, ...],  # dq, dk, dv, to be written
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> Tensor:
        *settings, bias_needs_grad = options
        wanted = bias is not None and bias_needs_grad
        dbias = torch.empty_like(_plain(bias)) if wanted else None
        grad, *parts_ = (_readable(tensor) for tensor in (grad, *parts))
        kernel_backward(grad, *parts_, out, lse, _plain(bias), *settings, *gradients, dbias)
        return grad.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        return *gradients, fill(grad, (q, k, v), gradients, out, lse, *options)

    def packed_forward(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.unbind(-3)
        return forward(q, k, v, *options)

    def packed_backward(
        grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        dqkv = qkv.new_empty(qkv.shape)
        return dqkv, fill(grad, qkv.unbind(-3), dqkv.unbind(-3), out, lse, *options)

    return Implementation(forward, backward, packed_forward, packed_backward)


def of_tensors_apart(forward: Callable[..., Any], backward: Callable[..., Any]) -> Implementation:
    """An implementation that returns its results and knows no packed form: that one copies."""

    def packed_forward(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(*qkv.unbind(-3), *options)
        return out, lse

    def packed_backward(
        grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        *dqkv, dbias = backward(grad, *qkv.unbind(-3), out, lse, *options)
        return torch.stack(dqkv, -3), dbias

    return Implementation(forward, backward, packed_forward, packed_backward)


def _readable(tensor: Tensor) -> Tensor:
    """With the last stride that the kernels take for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _plain(bias: Any) -> Any:
    """float32 and contiguous, as the kernels take it."""
    return None if bias is None else bias.float().contiguous()
