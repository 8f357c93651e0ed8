"""The operators of axial attention: schemas, shapes and gradients.

Beside its output a forward returns [2, B, *grid, heads]: each query's log-sum-exp, and what its
rounding lost.
`axial_attention` has q, k and v apart; `axial_attention_packed` has them in one tensor, and its
gradient is one tensor too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcrl_kernels.axial_attention import reference
from gcrl_kernels.axial_attention.launch import (
    Implementation,
    implementation,
    of_tensors_apart,
)
from gcrl_kernels.operators import (
    accumulation_dtype,
    define,
    differentiate,
    is_transformed,
    once_differentiable,
    saved_tensors,
)

_OPTIONS = "Tensor? bias, Tensor? mask, int axis, bool causal, float scale"


def _compiled(backend: str) -> Implementation:
    library = getattr(torch.ops, f"gcrl_kernels_{backend}")
    return implementation(
        lambda *arguments: library.axial_attention(*arguments),
        lambda *arguments: library.axial_attention_backward(*arguments),
    )


def _triton(name: str) -> Callable[..., None]:
    """A launcher, imported when it is first called: not every machine has Triton."""

    def launch(*arguments: Any) -> None:
        getattr(importlib.import_module(f"{__package__}.triton.launchers"), name)(*arguments)

    return launch


IMPLEMENTATIONS = {
    "reference": of_tensors_apart(reference.forward, reference.backward),
    "cpu": _compiled("cpu"),
    "cuda": _compiled("cuda"),
    "triton": implementation(_triton("forward"), _triton("backward")),
}


HALVES_AND_SINGLES = (torch.float16, torch.bfloat16, torch.float32)
GPU_LONGEST, GPU_FEATURES = 1024, range(16, 129, 8)


def cannot(backend: str, length: int, features: int, dtype: torch.dtype) -> str | None:
    """Why a backend's kernels do not take rows of this length, features and dtype."""
    if backend == "reference":
        return None
    if dtype not in HALVES_AND_SINGLES:
        return f"it takes float16, bfloat16 and float32, got {dtype}"
    if backend == "cpu":
        return None
    if length > GPU_LONGEST:
        return f"it takes rows of up to {GPU_LONGEST} positions, got {length}"
    if features not in GPU_FEATURES:
        return f"it takes 16 to 128 features a head in multiples of 8, got {features}"
    return None


def _forward_shapes(q: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty((2, *q.shape[:-1]), dtype=accumulation_dtype(q.dtype)),
    )


def _bias_shape(q: Tensor, bias: Tensor | None, bias_needs_grad: bool) -> Tensor:
    if bias is not None and bias_needs_grad:
        return torch.empty_like(bias, memory_format=torch.contiguous_format)
    return q.new_empty(0)


forward = define(
    f"axial_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    {name: each.forward for name, each in IMPLEMENTATIONS.items()},
    lambda q, *rest: _forward_shapes(q),
)
backward = define(
    "axial_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool bias_needs_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    {name: each.backward for name, each in IMPLEMENTATIONS.items()},
    lambda grad, q, k, v, out, lse, bias, *rest: (
        *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)),
        _bias_shape(q, bias, rest[-1]),
    ),
)
packed_forward = define(
    f"axial_attention_packed(Tensor qkv, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    {name: each.packed_forward for name, each in IMPLEMENTATIONS.items()},
    lambda qkv, *rest: _forward_shapes(qkv.select(-3, 0)),
)
packed_backward = define(
    "axial_attention_packed_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool bias_needs_grad, str backend) -> (Tensor, Tensor)",
    {name: each.packed_backward for name, each in IMPLEMENTATIONS.items()},
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


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor | None, gradient: Any) -> Any:
    saved = saved_tensors(ctx)
    # Within a transform of torch.func an outer one may need what needs_input_grad does not show.
    wanted = is_transformed() or ctx.needs_input_grad[len(saved) - 4]
    bias_needs_grad = saved[-2] is not None and wanted
    *gradients, dbias = gradient(grad, *saved, *ctx.options, bias_needs_grad, ctx.backend)
    # bias, then mask, axis, causal, scale and backend
    return *gradients, dbias if saved[-2] is not None else None, None, None, None, None, None


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> Any:
    return _differentiate(ctx, grad, grad_lse, _gradient)


def _packed_backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> Any:
    return _differentiate(ctx, grad, grad_lse, _packed_gradient)


attend = differentiate(forward, _save(3), _backward, "axial_attention")
attend_packed = differentiate(packed_forward, _save(1), _packed_backward, "axial_attention_packed")
_gradient = once_differentiable(backward, "axial_attention")
_packed_gradient = once_differentiable(packed_backward, "axial_attention_packed")
