"""Softmax cross-entropy whose targets are the nearest colours of a palette."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcrl_kernels import checks
from gcrl_kernels.backends import choose
from gcrl_kernels.color_cross_entropy import ops
from gcrl_kernels.color_cross_entropy.palette import check_pixels, fit_palette
from gcrl_kernels.operators import autocast, check_reverse_mode, is_transformed

__all__ = ["color_cross_entropy", "fit_palette", "linear_color_cross_entropy", "quantize_colors"]


def quantize_colors(pixels: Tensor, palette: Tensor, *, backend: str | None = None) -> Tensor:
    """The nearest palette colour of each pixel, by squared Euclidean distance.

    Args:
        pixels: [..., 3], uint8 or floating point.
        palette: [K, 3], integers (that fit int32) or floating point, in the units of `pixels`.
            uint8 pixels are compared with an integer palette in integers, exactly.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the pixels' device.

    Returns:
        int64 [...], 0 to K - 1: the lowest index where several are nearest. -1 for a pixel that has
        no colour at a finite distance: one with a NaN or an infinity, and in float32 one that is
        about 1.8e19 from every colour, whose square overflows. A NaN colour is never the nearest.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device than stated.
        BackendUnavailableError: a backend asked for by name cannot serve here.
    """
    check_pixels(pixels)
    _check_palette(palette, pixels)
    return ops.quantize_colors(pixels, palette, choose("quantize_colors", backend, pixels))


def color_cross_entropy(
    logits: Tensor,
    pixels: Tensor,
    palette: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | Any:  # with a return_ flag a tuple
    """Softmax cross-entropy in nats, whose targets are quantize_colors(pixels, palette).

    Args:
        logits: [..., K], floating point.
        pixels: [..., 3], uint8 or floating point; without a palette, ready tokens: integers [...].
            A target outside 0 to K - 1 (a NaN pixel's too) makes its loss NaN.
        palette: [K, 3], in the units of `pixels`.
        mask: bool [...]; True counts. What is left out has zero loss and gradient, whatever its
            values.
        reduction: "mean" over the positions that count (none gives NaN), "sum" or "none".
        label_smoothing: share of the target spread evenly over the colours, 0 to 1 (arXiv
            1512.00567).
        z_loss: weight of the square of the log-sum-exp, at least 0 and finite, added to the loss
            (arXiv 2204.02311).
        return_z_loss: also return that part of the loss, without a gradient.
        inplace_backward: allow the backward to overwrite the logits with their gradient.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the logits' device.

    Returns:
        The loss, float32 (float64 for float64 logits), a scalar or [...]; with return_z_loss also
        its z-loss part.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device than stated.
        BackendUnavailableError: a backend asked for by name cannot serve here.
    """
    checks.check_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise checks.value_error(
            "logits", "[..., K] with at least one colour", checks.shape(logits)
        )
    checks.check_flag("inplace_backward", inplace_backward)
    _check_targets(logits.shape[:-1], logits.shape[-1], "logits", logits, pixels, palette, mask)
    label_smoothing, z_loss = _check_loss_options(reduction, label_smoothing, z_loss, return_z_loss)
    (logits,) = autocast(logits)
    check_reverse_mode("color_cross_entropy", logits)
    loss, z_term, *_ = ops.differentiable(
        logits,
        pixels,
        palette,
        mask,
        reduction,
        label_smoothing,
        z_loss,
        inplace_backward,
        _choose("color_cross_entropy", backend, logits, logits.shape[-1]),
    )
    return (loss, z_term) if return_z_loss else loss


def linear_color_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    pixels: Tensor,
    palette: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    backend: str | None = None,
) -> Tensor | Any:  # with a return_ flag a tuple
    """`color_cross_entropy` of hidden @ weight.T + bias, whose logits are never stored whole.

    Args:
        hidden: [..., C], floating point.
        weight: [K, C], in hidden's dtype (under autocast any).
        bias: [K], likewise.

    The other arguments, the result and the errors are those of `color_cross_entropy`. The weight's
    gradient is accumulated in float32 (float64 for float64 inputs).
    """
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        checks.check_floating(name, tensor)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise checks.value_error(
            "hidden", "[..., C] with at least one feature", checks.shape(hidden)
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        got = f"{checks.shape(weight)} for hidden {checks.shape(hidden)}"
        raise checks.value_error("weight", f"[K, C = {hidden.shape[-1]}]", got)
    checks.check_same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        checks.check_floating("bias", bias)
        checks.check_shape("bias", bias, weight.shape[:1], "[K]")
        checks.check_same_device("bias", bias, "hidden", hidden)
    _check_targets(hidden.shape[:-1], weight.shape[0], "hidden", hidden, pixels, palette, mask)
    label_smoothing, z_loss = _check_loss_options(reduction, label_smoothing, z_loss, return_z_loss)
    parameters = (hidden, weight) if bias is None else (hidden, weight, bias)
    hidden, weight, *rest = autocast(*parameters)
    bias = rest[0] if rest else None
    checks.check_same_dtype("weight", weight, "hidden", hidden)
    if bias is not None:
        checks.check_same_dtype("bias", bias, "hidden", hidden)
    transformed = is_transformed()
    forward_differentiates = torch.is_grad_enabled() and reduction != "none"
    check_reverse_mode("linear_color_cross_entropy", hidden, weight, bias)
    loss, z_term, *_ = ops.linear_differentiable(
        hidden,
        weight,
        bias,
        pixels,
        palette,
        mask,
        reduction,
        label_smoothing,
        z_loss,
        [
            # A transform of torch.func may not show that a tensor inside it requires a gradient.
            int(
                forward_differentiates
                and tensor is not None
                and (transformed or tensor.requires_grad)
            )
            for tensor in (hidden, weight, bias)
        ],
        True,  # nobody else sees the gradients that the forward makes
        _choose("linear_color_cross_entropy", backend, hidden, len(weight)),
    )
    return (loss, z_term) if return_z_loss else loss


def _choose(operator: str, requested: str | None, tensor: Tensor, colors: int) -> str:
    return choose(
        operator, requested, tensor, lambda backend: ops.cannot(backend, tensor.dtype, colors)
    )


def _check_palette(palette: Tensor, pixels: Tensor) -> None:
    dtypes = (*checks.INTEGERS, *checks.FLOATS)
    checks.check_dtype("palette", palette, dtypes, "an integer or floating-point tensor")
    if palette.dim() != 2 or palette.shape[1] != 3 or palette.shape[0] == 0:
        raise checks.value_error(
            "palette", "[K, 3] with at least one colour", checks.shape(palette)
        )
    checks.check_same_device("palette", palette, "pixels", pixels)


def _check_targets(
    positions: torch.Size,
    colors: int,
    name: str,
    tensor: Tensor,
    pixels: Tensor,
    palette: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raise unless pixels and mask have each position of `tensor`, and the palette each colour."""
    if palette is None:
        checks.check_dtype(
            "pixels", pixels, checks.INTEGERS, "integer tokens where there is no palette"
        )
        checks.check_shape("pixels", pixels, positions, f"of {name} without its last dimension")
    else:
        check_pixels(pixels)
        checks.check_shape(
            "pixels", pixels, (*positions, 3), f"of {name} with 3 as its last dimension"
        )
        _check_palette(palette, pixels)
        if palette.shape[0] != colors:
            raise checks.value_error(
                "palette", f"[K, 3] with K = {colors} colours", checks.shape(palette)
            )
    checks.check_same_device("pixels", pixels, name, tensor)
    if mask is not None:
        checks.check_bool("mask", mask)
        checks.check_shape("mask", mask, positions, f"of {name} without its last dimension")
        checks.check_same_device("mask", mask, name, tensor)


def _check_loss_options(
    reduction: str, label_smoothing: float, z_loss: float, return_z_loss: bool
) -> tuple[float, float]:
    """The two numbers, as Python's."""
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    label_smoothing = checks.number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise checks.value_error("label_smoothing", "0 to 1", label_smoothing)
    z_loss = checks.at_least("z_loss", checks.number("z_loss", z_loss), 0)
    checks.check_flag("return_z_loss", return_z_loss)
    return label_smoothing, z_loss
