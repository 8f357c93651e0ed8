"""The operators of the colour-quantised cross-entropy: schemas, shapes and gradients.

Where the reduction is a scalar, the linear form's forward computes the gradients of the *sum* of
the losses; the division by the count and the upstream gradient are applied in backward, in the
accumulation dtype, so that they do not vanish in half precision.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from gcrl_kernels.color_cross_entropy import reference
from gcrl_kernels.operators import accumulation_dtype, define, differentiate, once_differentiable

_OPTIONS = "str reduction, float label_smoothing, float z_loss"


def _compiled(namespace: str) -> Any:
    """The compiled quantiser of a library, on contiguous tensors of the dtypes that it takes."""

    def quantize(pixels: Tensor, palette: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8 and not palette.is_floating_point():
            palette = palette.to(torch.int32)
        else:
            dtype = reference.distance_dtype(pixels, palette)
            pixels, palette = pixels.to(dtype), palette.to(dtype)
        library = getattr(torch.ops, namespace)
        return library.quantize_colors(pixels.contiguous(), palette.contiguous())

    return quantize


quantize_colors = define(
    "quantize_colors(Tensor pixels, Tensor palette, str backend) -> Tensor",
    {
        "reference": reference.quantize_colors,
        "cpu": _compiled("gcrl_kernels_cpu"),
        "cuda": _compiled("gcrl_kernels_cuda"),
    },
    lambda pixels, palette: pixels.new_empty(pixels.shape[:-1], dtype=torch.int64),
)


def _targets(pixels: Tensor, palette: Tensor | None) -> Tensor:
    """int64 [M]: the nearest colours, or the tokens as they are given."""
    if palette is not None:
        return reference.quantize_colors(pixels, palette).flatten()
    return pixels.flatten().to(torch.int64, copy=True)


def _flat_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten()


def _reduce(values: Tensor, mask: Tensor | None, reduction: str, shape: torch.Size) -> Tensor:
    if reduction == "none":
        return values.view(shape)
    total = values.sum()
    return total if reduction == "sum" else total / _count(values, mask)


def _count(values: Tensor, mask: Tensor | None) -> Tensor:
    """How many positions the mean is over, as a scalar on the device."""
    if mask is None:
        return values.new_tensor(float(len(values)))
    return mask.sum().to(values.dtype)


def _position_gradient(grad: Tensor, lse: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """The upstream gradient of each position's loss: [M], or one for all of a scalar loss."""
    if reduction == "none":
        return grad.flatten()
    return grad / _count(lse, mask).clamp_min(1) if reduction == "mean" else grad


def _forward(
    logits: Tensor,
    pixels: Tensor,
    palette: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, counted, shape = _targets(pixels, palette), _flat_mask(mask), logits.shape[:-1]
    loss, z_term, lse = reference.forward(
        logits.reshape(-1, logits.shape[-1]),
        tokens,
        counted,
        label_smoothing,
        z_loss,
    )
    loss, z_term = (_reduce(values, counted, reduction, shape) for values in (loss, z_term))
    return loss, z_term, lse, tokens


def _backward(
    grad: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    tokens: Tensor,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    inplace_backward: bool,
) -> Tensor:
    counted = _flat_mask(mask)
    gradient = reference.backward(
        _position_gradient(grad, lse, counted, reduction).expand(len(lse)),
        logits.reshape(-1, logits.shape[-1]),
        tokens,
        counted,
        lse,
        label_smoothing,
        z_loss,
    )
    return gradient.to(logits.dtype).view(logits.shape)


def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pixels: Tensor,
    palette: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    needs_sum_grad: bool,
) -> tuple[Tensor, ...]:
    tokens, counted, shape = _targets(pixels, palette), _flat_mask(mask), hidden.shape[:-1]
    loss, z_term, lse, *gradients = reference.linear_forward(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        tokens,
        counted,
        label_smoothing,
        z_loss,
        needs_sum_grad,
    )
    loss, z_term = (_reduce(values, counted, reduction, shape) for values in (loss, z_term))
    return loss, z_term, lse, tokens, *gradients


def _linear_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    tokens: Tensor,
    dhidden: Tensor,  # these three: of the sum of the losses
    dweight: Tensor,
    dbias: Tensor,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    counted = _flat_mask(mask)
    if reduction == "none":
        dhidden, dweight, dbias = reference.linear_backward(
            _position_gradient(grad, lse, counted, reduction),
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            tokens,
            counted,
            lse,
            label_smoothing,
            z_loss,
        )
    else:
        scale = _position_gradient(grad, lse, counted, reduction)
        dhidden, dweight, dbias = dhidden * scale, dweight * scale, dbias * scale
    bias_dtype = dbias.dtype if bias is None else bias.dtype
    return (
        dhidden.to(hidden.dtype).view(hidden.shape),
        dweight.to(weight.dtype),
        dbias.to(bias_dtype),
    )


def _loss_shapes(hidden: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of loss, z-loss, lse and tokens."""
    dtype, shape = accumulation_dtype(hidden.dtype), hidden.shape[:-1]
    reduced = shape if reduction == "none" else ()
    return (
        hidden.new_empty(reduced, dtype=dtype),
        hidden.new_empty(reduced, dtype=dtype),
        hidden.new_empty(prod(shape), dtype=dtype),
        hidden.new_empty(prod(shape), dtype=torch.int64),
    )


def _linear_shapes(
    hidden: Tensor, weight: Tensor, bias: Any, pixels: Any, palette: Any, mask: Any, *options: Any
) -> tuple[Tensor, ...]:
    reduction, _, _, needs_sum_grad = options
    dtype, (colors, features) = accumulation_dtype(hidden.dtype), weight.shape
    positions, colors = (prod(hidden.shape[:-1]), colors) if needs_sum_grad else (0, 0)
    return (
        *_loss_shapes(hidden, reduction),
        hidden.new_empty(positions, features),
        hidden.new_empty(colors, features, dtype=dtype),
        hidden.new_empty(colors, dtype=dtype),
    )


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


color_cross_entropy = define(
    "color_cross_entropy(Tensor logits, Tensor pixels, Tensor? palette, Tensor? mask, "
    f"{_OPTIONS}, bool inplace_backward, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    {"reference": _forward},
    lambda logits, pixels, palette, mask, reduction, *rest: _loss_shapes(logits, reduction),
)
_color_backward = define(
    "color_cross_entropy_backward(Tensor grad, Tensor logits, Tensor? mask, Tensor lse, "
    f"Tensor tokens, {_OPTIONS}, bool inplace_backward, str backend) -> Tensor",
    {"reference": _backward},
    lambda grad, logits, *rest: _contiguous_like(logits),
)
linear_color_cross_entropy = define(
    "linear_color_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor pixels, "
    f"Tensor? palette, Tensor? mask, {_OPTIONS}, bool needs_sum_grad, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"reference": _linear_forward},
    _linear_shapes,
)
_linear_color_backward = define(
    "linear_color_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor? mask, Tensor lse, Tensor tokens, Tensor dhidden, Tensor dweight, Tensor dbias, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)",
    {"reference": _linear_backward},
    lambda grad, hidden, weight, bias, *rest: (
        _contiguous_like(hidden),
        _contiguous_like(weight),
        weight.new_empty(len(weight), dtype=rest[3].dtype if bias is None else bias.dtype),
    ),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, mask, *ctx.options = inputs
    _, z_term, lse, tokens = output
    ctx.mark_non_differentiable(z_term, lse, tokens)
    ctx.save_for_backward(logits, mask, lse, tokens)


def _gradient(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    dlogits = _color_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dlogits, *[None] * 8


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _, _, mask, *options, _, backend = inputs
    _, z_term, lse, tokens, *sum_gradients = output
    ctx.mark_non_differentiable(z_term, lse, tokens, *sum_gradients)
    ctx.options = (*options, backend)
    ctx.save_for_backward(hidden, weight, bias, mask, lse, tokens, *sum_gradients)


def _linear_gradient(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    dhidden, dweight, dbias = _linear_color_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dhidden, dweight, dbias if ctx.saved_tensors[2] is not None else None, *[None] * 8


differentiate(color_cross_entropy, _setup, _gradient)
differentiate(linear_color_cross_entropy, _linear_setup, _linear_gradient)
once_differentiable(_color_backward, "color_cross_entropy")
once_differentiable(_linear_color_backward, "linear_color_cross_entropy")
