"""The operators of the colour-quantised cross-entropy: schemas, shapes and gradients.

Of the linear form under a scalar reduction, the forward computes the gradients of the *sum* of the
losses, those that somebody needs. The count and the upstream gradient are applied in backward, in
the accumulation dtype, so that gradients do not vanish in half precision. From logits a gradient is
one more pass over them, made in backward from their log-sum-exp: writing it in the forward and
scaling it later would be two.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from gcrl_kernels.color_cross_entropy import compiled, launch, reference
from gcrl_kernels.color_cross_entropy.implementation import Implementation
from gcrl_kernels.operators import (
    accumulation_dtype,
    as_bool,
    define,
    differentiate,
    is_transformed,
    once_differentiable,
    saved_tensors,
)

_OPTIONS = "str reduction, float label_smoothing, float z_loss"


def _cuda_forward(logits: Tensor, pixels: Tensor, palette: Tensor | None, *rest: Any) -> None:
    pixels, palette = compiled.as_targets(pixels, palette)
    if palette is not None and palette.dtype == torch.float64:
        pixels, palette = _CUDA.quantize_colors(pixels, palette), None
    _CUDA.library.color_cross_entropy(logits, pixels, palette, *rest)


def _cuda_backward(*arguments: Any) -> None:
    _CUDA.library.color_cross_entropy_backward(*arguments)


def _triton(name: str) -> Callable[..., None]:
    """A launcher, imported when it is first called: not every machine has Triton."""

    def launcher(*arguments: Any) -> None:
        getattr(importlib.import_module(f"{__package__}.triton.launchers"), name)(*arguments)

    return launcher


_CPU, _CUDA = compiled.Compiled("gcrl_kernels_cpu"), compiled.Compiled("gcrl_kernels_cuda")
QUANTIZERS: dict[str, launch.Quantizer] = {
    "reference": reference.quantize_colors,
    "cpu": _CPU.quantize_colors,
    "cuda": _CUDA.quantize_colors,
    "triton": launch.quantizer(_triton("quantize_colors")),
}
IMPLEMENTATIONS = {
    "reference": reference.IMPLEMENTATION,
    "cpu": _CPU.implementation(),
    "cuda": launch.implementation(_CUDA.quantize_colors, _cuda_forward, _cuda_backward),
    "triton": launch.implementation(QUANTIZERS["triton"], _triton("forward"), _triton("backward")),
}
GPU_COLORS = 4096


def cannot(backend: str, dtype: torch.dtype, colors: int) -> str | None:
    """Why a backend's losses do not take tensors of this dtype, and so many colours."""
    if backend == "reference":
        return None
    if dtype == torch.float64:
        return f"it takes float16, bfloat16 and float32, got {dtype}"
    if backend in ("cuda", "triton") and colors > GPU_COLORS:
        return f"it takes up to {GPU_COLORS} colours, got {colors}"
    return None


def _positions(tensor: Tensor) -> Tensor:
    """[M, last]: the positions in one dimension."""
    return tensor.reshape(-1, tensor.shape[-1])


def _targets(pixels: Tensor, palette: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Pixels [M, 3], or tokens [M] where there is no palette; the palette."""
    return pixels.flatten() if palette is None else _positions(pixels), palette


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else as_bool(mask).flatten()


def _reduce(
    loss: Tensor, z_term: Tensor, mask: Tensor | None, reduction: str, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and z-loss of all positions [M], reduced; what the sum is divided by."""
    if reduction == "none":
        return loss.view(shape), z_term.view(shape), loss.new_ones(())
    loss, z_term = loss.sum(), z_term.sum()
    if reduction == "sum":
        return loss, z_term, loss.new_ones(())
    count = loss.new_tensor(float(prod(shape))) if mask is None else mask.sum().to(loss.dtype)
    return loss / count, z_term / count, count


def _forward(implementation: Implementation) -> Callable[..., Any]:
    def forward(
        logits: Tensor,
        pixels: Tensor,
        palette: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        mask = _flat(mask)
        loss, z_term, lse, tokens = implementation.forward(
            _positions(logits), *_targets(pixels, palette), mask, label_smoothing, z_loss
        )
        return *_reduce(loss, z_term, mask, reduction, logits.shape[:-1]), lse, tokens

    return forward


def _backward(implementation: Implementation) -> Callable[..., Any]:
    def backward(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
        gradient = _contiguous_like(logits)
        _write_gradient(implementation, gradient, grad, logits, *rest)
        return gradient

    return backward


def _backward_in_place(implementation: Implementation) -> Callable[..., Any]:
    def backward(grad: Tensor, logits: Tensor, *rest: Any) -> None:
        _write_gradient(implementation, logits, grad, logits, *rest)

    return backward


def _write_gradient(
    implementation: Implementation,
    gradient: Tensor,  # to be written
    grad: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    count: Tensor,
    lse: Tensor,
    tokens: Tensor,
    *options: float,
) -> None:
    implementation.backward(
        _scale(grad, count).flatten().expand(lse.shape[1]),
        _positions(logits),
        tokens,
        _flat(mask),
        lse,
        *options,
        _positions(gradient),
    )


def _scale(grad: Tensor, count: Tensor) -> Tensor:
    """What the gradient of a position's loss is multiplied by."""
    return grad / count.clamp_min(1)  # where nothing counts there are only zeros to divide


def _linear_forward(implementation: Implementation) -> Callable[..., Any]:
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pixels: Tensor,
        palette: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
        needs_sum_grad: list[bool],
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        mask = _flat(mask)
        loss, z_term, lse, tokens, dhidden, *gradients = implementation.linear_forward(
            _positions(hidden),
            weight,
            bias,
            *_targets(pixels, palette),
            mask,
            label_smoothing,
            z_loss,
            reduction == "none",
            needs_sum_grad,
        )
        reduced = _reduce(loss, z_term, mask, reduction, hidden.shape[:-1])
        if needs_sum_grad[0]:
            dhidden = dhidden.view(hidden.shape)
        return *reduced, lse, tokens, dhidden, *gradients

    return forward


def _linear_backward(implementation: Implementation) -> Callable[..., Any]:
    def backward(
        grad: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        lse: Tensor,
        tokens: Tensor,
        label_smoothing: float,
        z_loss: float,
        needs_grad: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dhidden, dweight, dbias = implementation.linear_backward(
            grad.flatten(),
            _positions(hidden),
            weight,
            bias,
            tokens,
            _flat(mask),
            lse,
            label_smoothing,
            z_loss,
            needs_grad,
        )
        if needs_grad[0]:
            dhidden = dhidden.view(hidden.shape)
        return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)

    return backward


def _scaled(grad: Tensor, count: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = torch.empty_like(gradient, dtype=dtype)
    _write_scaled(grad, count, gradient, scaled)
    return scaled


def _scale_in_place(grad: Tensor, count: Tensor, gradient: Tensor) -> None:
    _write_scaled(grad, count, gradient, gradient)


def _write_scaled(grad: Tensor, count: Tensor, gradient: Tensor, scaled: Tensor) -> None:
    scale = _scale(grad, count)
    if scale.device.type != "cpu":
        # A tensor without dimensions would be rounded to a half; on a CPU it is not.
        scale = scale[None]
    torch.mul(gradient, scale, out=scaled)


def _loss_shapes(hidden: Tensor, reduction: str, keep: bool) -> tuple[Tensor, ...]:
    """Of loss, z-loss, count, lse and tokens."""
    dtype, shape = accumulation_dtype(hidden.dtype), hidden.shape[:-1]
    reduced, kept = shape if reduction == "none" else (), prod(shape) if keep else 0
    return (
        hidden.new_empty(reduced, dtype=dtype),
        hidden.new_empty(reduced, dtype=dtype),
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((2, kept), dtype=dtype),
        hidden.new_empty(kept, dtype=torch.int64),
    )


def _linear_shapes(
    hidden: Tensor, weight: Tensor, bias: Any, pixels: Any, palette: Any, mask: Any, *options: Any
) -> tuple[Tensor, ...]:
    reduction, _, _, needs_sum_grad, _ = options
    dtype = accumulation_dtype(hidden.dtype)
    return (
        *_loss_shapes(hidden, reduction, reduction == "none"),
        *_gradient_shapes(hidden, weight, needs_sum_grad, dtype),
    )


def _gradient_shapes(
    hidden: Tensor, weight: Tensor, needed: list[bool], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Of dhidden, in hidden's dtype, dweight and dbias, in `dtype`; [0] of what nobody needs."""
    return (
        _contiguous_like(hidden) if needed[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape if needed[1] else 0, dtype=dtype),
        weight.new_empty(len(weight) if needed[2] else 0, dtype=dtype),
    )


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _for_each(make: Callable[[Implementation], Any]) -> dict[str, Any]:
    return {backend: make(implementation) for backend, implementation in IMPLEMENTATIONS.items()}


quantize_colors = define(
    "quantize_colors(Tensor pixels, Tensor palette, str backend) -> Tensor",
    QUANTIZERS,
    lambda pixels, palette: pixels.new_empty(pixels.shape[:-1], dtype=torch.int64),
)
color_cross_entropy = define(
    "color_cross_entropy(Tensor logits, Tensor pixels, Tensor? palette, Tensor? mask, "
    f"{_OPTIONS}, bool inplace_backward, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _for_each(_forward),
    lambda logits, pixels, palette, mask, reduction, *rest: _loss_shapes(logits, reduction, True),
)
_SAVED = (
    "Tensor? mask, Tensor count, Tensor lse, Tensor tokens, float label_smoothing, float z_loss"
)
_color_backward = define(
    f"color_cross_entropy_backward(Tensor grad, Tensor logits, {_SAVED}, str backend) -> Tensor",
    _for_each(_backward),
    lambda grad, logits, *rest: _contiguous_like(logits),
)
_color_backward_in_place = define(
    f"color_cross_entropy_backward_(Tensor grad, Tensor(a!) logits, {_SAVED}, str backend) -> ()",
    _for_each(_backward_in_place),
    lambda *arguments: None,
)
linear_color_cross_entropy = define(
    "linear_color_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor pixels, "
    f"Tensor? palette, Tensor? mask, {_OPTIONS}, int[] needs_sum_grad, bool inplace_backward, "
    "str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _for_each(_linear_forward),
    _linear_shapes,
)
_linear_color_backward = define(
    "linear_color_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor? mask, Tensor lse, Tensor tokens, float label_smoothing, float z_loss, "
    "int[] needs_grad, str backend) -> (Tensor, Tensor, Tensor)",
    _for_each(_linear_backward),
    lambda grad, hidden, weight, *rest: _gradient_shapes(hidden, weight, rest[-1], weight.dtype),
)
_scale_sum_gradient = define(
    "linear_color_cross_entropy_scale(Tensor grad, Tensor count, Tensor gradient, "
    "ScalarType dtype, str backend) -> Tensor",
    dict.fromkeys(IMPLEMENTATIONS, _scaled),
    lambda grad, count, gradient, dtype: torch.empty_like(gradient, dtype=dtype),
)
_scale_sum_gradient_in_place = define(
    "linear_color_cross_entropy_scale_(Tensor grad, Tensor count, Tensor(a!) gradient, "
    "str backend) -> ()",
    dict.fromkeys(IMPLEMENTATIONS, _scale_in_place),
    lambda *arguments: None,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, mask, _, *numbers, ctx.in_place, backend = inputs
    _, z_term, count, lse, tokens = output
    ctx.mark_non_differentiable(z_term, count, lse, tokens)
    ctx.set_materialize_grads(False)
    ctx.options = (*numbers, backend)
    ctx.save_for_backward(logits, mask, count, lse, tokens)


def _gradient(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    logits, *rest = saved_tensors(ctx)
    if ctx.in_place and _may_be_overwritten(logits):
        _color_backward_in_place(grad, logits, *rest, *ctx.options)
        torch.autograd.graph.increment_version(logits)  # other readers are told
        return logits, *[None] * 8
    return _differentiate_logits(grad, logits, *rest, *ctx.options), *[None] * 8


def _may_be_overwritten(tensor: Tensor) -> bool:
    """Not where gradients are to have a graph, nor where a compiler traces the backward."""
    plain = type(tensor) is Tensor and not is_transformed()
    return plain and not torch.is_grad_enabled() and tensor.is_contiguous()


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _, _, mask, reduction, *numbers, _, ctx.in_place, backend = inputs
    _, z_term, count, lse, tokens, *sum_gradients = output
    ctx.mark_non_differentiable(z_term, count, lse, tokens, *sum_gradients)
    ctx.set_materialize_grads(False)  # else zeros as large as the gradients come in
    ctx.is_scalar = reduction != "none"
    ctx.needed = [int(needed) for needed in ctx.needs_input_grad[:3]]
    if is_transformed():  # an outer transform may need what is not shown here
        ctx.needed = [int(tensor is not None) for tensor in (hidden, weight, bias)]
    if ctx.is_scalar:
        ctx.options = hidden.dtype, backend
        ctx.save_for_backward(count, *sum_gradients)
    else:
        ctx.options = (*numbers, ctx.needed, backend)
        ctx.save_for_backward(hidden, weight, bias, mask, lse, tokens)


def _linear_gradient(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    if ctx.is_scalar:
        gradients = _scale_all(ctx, grad)
    else:
        gradients = _differentiate_linear(grad, *saved_tensors(ctx), *ctx.options)
    computed = zip(gradients, ctx.needed, strict=True)
    return *(gradient if needed else None for gradient, needed in computed), *[None] * 9


def _scale_all(ctx: Any, grad: Tensor) -> list[Tensor]:
    count, *gradients = saved_tensors(ctx)
    dtype, backend = ctx.options
    in_place = ctx.in_place and not _graph_is_kept()
    if torch.is_grad_enabled() and not is_transformed():
        # The inputs are not kept, yet a second derivative is to meet the operator, which raises.
        grad = grad.detach().requires_grad_()
    scaled = []
    for gradient in gradients:
        if in_place and gradient.dtype == dtype and _may_be_overwritten(gradient):
            _scale_sum_gradient_in_place(grad, count, gradient, backend)
            scaled.append(gradient)
        else:
            scaled.append(_scale_gradient(grad, count, gradient, dtype, backend))
    return scaled


def _graph_is_kept() -> bool:
    """Whether a further backward may go through the graph that one is going through."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or keeps()


differentiable = differentiate(color_cross_entropy, _setup, _gradient, "color_cross_entropy")
linear_differentiable = differentiate(
    linear_color_cross_entropy, _linear_setup, _linear_gradient, "linear_color_cross_entropy"
)
_differentiate_logits = once_differentiable(_color_backward, "color_cross_entropy")
_differentiate_linear = once_differentiable(_linear_color_backward, "linear_color_cross_entropy")
_scale_gradient = once_differentiable(_scale_sum_gradient, "linear_color_cross_entropy")
