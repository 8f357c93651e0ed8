"""The operators of axial attention: schemas, shapes and gradients.

`axial_attention` has q, k and v apart; `axial_attention_packed` has them in one tensor, and its
gradient is one tensor too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcrl_kernels.axial_attention import reference
from gcrl_kernels.operators import accumulation_dtype, define, differentiate, once_differentiable

_OPTIONS = "Tensor? bias, Tensor? mask, int axis, bool causal, float scale"


def _packed_forward(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    return reference.forward(q, k, v, *options)


def _packed_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    *dqkv, dbias = reference.backward(grad, q, k, v, out, lse, *options)
    return torch.stack(dqkv, -3), dbias


def _forward_shapes(q: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype)),
    )


def _bias_shape(q: Tensor, bias: Tensor | None, bias_needs_grad: bool) -> Tensor:
    if bias is not None and bias_needs_grad:
        return torch.empty_like(bias, memory_format=torch.contiguous_format)
    return q.new_empty(0)


forward = define(
    f"axial_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    {"reference": reference.forward},
    lambda q, *rest: _forward_shapes(q),
)
backward = define(
    "axial_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool bias_needs_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    {"reference": reference.backward},
    lambda grad, q, k, v, out, lse, bias, *rest: (
        *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)),
        _bias_shape(q, bias, rest[-1]),
    ),
)
packed_forward = define(
    f"axial_attention_packed(Tensor qkv, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    {"reference": _packed_forward},
    lambda qkv, *rest: _forward_shapes(qkv.select(-3, 0)),
)
packed_backward = define(
    "axial_attention_packed_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool bias_needs_grad, str backend) -> (Tensor, Tensor)",
    {"reference": _packed_backward},
    lambda grad, qkv, out, lse, bias, *rest: (
        torch.empty_like(qkv, memory_format=torch.contiguous_format),
        _bias_shape(qkv, bias, rest[-1]),
    ),
)


def _save(inputs_before_bias: int) -> Any:
    """Both forms keep their inputs, the output and its lse; lse itself has no gradient."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tensors, (bias, mask, *options) = inputs[:inputs_before_bias], inputs[inputs_before_bias:]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output, bias, mask)
        *ctx.options, ctx.backend = options

    return setup_context


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor | None, operator: Any) -> Any:
    bias = ctx.saved_tensors[-2]
    *gradients, dbias = operator(
        grad,
        *ctx.saved_tensors,
        *ctx.options,
        bias is not None and ctx.needs_input_grad[len(ctx.saved_tensors) - 4],
        ctx.backend,
    )
    # bias, then mask, axis, causal, scale and backend
    return *gradients, dbias if bias is not None else None, None, None, None, None, None


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> Any:
    return _differentiate(ctx, grad, grad_lse, backward)


def _packed_backward_of(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> Any:
    return _differentiate(ctx, grad, grad_lse, packed_backward)


differentiate(forward, _save(3), _backward)
differentiate(packed_forward, _save(1), _packed_backward_of)
once_differentiable(backward, "axial_attention")
once_differentiable(packed_backward, "axial_attention_packed")
