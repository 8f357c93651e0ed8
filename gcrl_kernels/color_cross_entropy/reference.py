"""Colour-quantised cross-entropy in plain PyTorch, on any device: the meaning of the kernels.

With a position's logits z, its target t (the nearest palette colour), label smoothing e and z-loss
weight w:

    lse = log Σ exp(z_k)
    loss = lse - (1 - e) z_t - e/K Σ z_k + w lse²
    dloss/dz_k = (1 + 2 w lse) softmax(z)_k - (1 - e) [k = t] - e/K

(label smoothing: Szegedy et al. 2016, arXiv 1512.00567; z-loss: Chowdhery et al. 2022, arXiv
2204.02311). A target outside the palette gives NaN. Positions that the mask leaves out have zero
loss and gradient, whatever their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gcrl_kernels.color_cross_entropy.implementation import Implementation
from gcrl_kernels.operators import accumulation_dtype
from gcrl_kernels.softmax import exponentials, log_sum_exp, softmax

CHUNK = 8192  # positions at a time: their logits, or their distances, are all that is stored


def quantize_colors(pixels: Tensor, palette: Tensor) -> Tensor:
    """The nearest palette colour [K, 3] of each pixel [..., 3], int64 [...]; -1: there is none."""
    flat = pixels.reshape(-1, 3)
    nearest = torch.empty(len(flat), dtype=torch.int64, device=pixels.device)
    for part in _chunks(len(flat)):
        nearest[part] = _nearest(flat[part], palette)
    return nearest.view(pixels.shape[:-1])


def distance_dtype(pixels: Tensor, palette: Tensor) -> torch.dtype:
    """Where not both are integers: float64 if either is, otherwise float32."""
    return torch.promote_types(torch.float32, torch.promote_types(pixels.dtype, palette.dtype))


def _nearest(pixels: Tensor, palette: Tensor) -> Tensor:
    if not (pixels.is_floating_point() or palette.is_floating_point()):
        return _lowest(_integer_distance_is_least(pixels, palette))
    dtype = distance_dtype(pixels, palette)
    difference = [pixels[:, None, c].to(dtype) - palette[None, :, c].to(dtype) for c in range(3)]
    distance = torch.stack([d * d for d in difference]).sum(0)  # [M, K]
    distance = distance.nan_to_num(nan=torch.inf, posinf=torch.inf)
    least = distance.amin(1, keepdim=True)
    return _lowest(distance == least).masked_fill(least[:, 0] == torch.inf, -1)


def _integer_distance_is_least(pixels: Tensor, palette: Tensor) -> Tensor:
    """Which colours are nearest, bool [M, K], exactly: a square of 32 bits may not fit int64.

    With |difference| = 2^16 a + b it is 2^32 a² + 2^17 a b + b², here in two parts of 32 bits.
    """
    difference = (pixels[:, None].long() - palette[None].long()).abs()  # [M, K, 3]
    a, b = difference >> 16, difference & 0xFFFF
    low = ((a * b).sum(-1) << 17) + (b * b).sum(-1)
    high = (a * a).sum(-1) + (low >> 32)
    low &= 0xFFFFFFFF
    is_least = high == high.amin(1, keepdim=True)
    low = low.masked_fill(~is_least, 1 << 32)
    return low == low.amin(1, keepdim=True)


def _lowest(is_nearest: Tensor) -> Tensor:
    """The first that is true in each row; argmin does not say which of several it returns."""
    colors = torch.arange(is_nearest.shape[1], device=is_nearest.device)
    return torch.where(is_nearest, colors, is_nearest.shape[1]).amin(1)


def targets(pixels: Tensor, palette: Tensor | None) -> Tensor:
    """int64 [M]: the nearest colours, or the tokens as they are given."""
    if palette is not None:
        return quantize_colors(pixels, palette)
    return pixels.to(torch.int64, copy=True)


def forward(
    logits: Tensor,  # [M, K]
    pixels: Tensor,  # [M, 3], or tokens [M] without a palette
    palette: Tensor | None,  # [K, 3]
    mask: Tensor | None,  # bool [M]
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, z-loss part, log-sum-exp with its residual [2, M] and token of each position, [M]."""
    tokens = targets(pixels, palette)
    return *_losses(logits, tokens, mask, label_smoothing, z_loss), tokens


def _losses(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(accumulation_dtype(logits.dtype))
    colors = logits.shape[1]
    numerators, maximum = exponentials(logits)
    total = numerators.sum(1)
    lse = log_sum_exp(maximum, total)
    z_term = z_loss * lse[0] * lse[0]  # not the square, which may be infinite, and 0 * inf is NaN
    target = logits.gather(1, tokens.clamp(0, colors - 1)[:, None])[:, 0]
    # From the maximum on, so that what all logits have in common is not in the sum.
    loss = total.log() - (1 - label_smoothing) * (target - maximum) + z_term
    if label_smoothing:
        loss = loss - label_smoothing * (logits - maximum[:, None]).mean(1)
    loss = torch.where((tokens >= 0) & (tokens < colors), loss, torch.nan)
    if mask is not None:
        loss, z_term = loss.where(mask, 0.0), z_term.where(mask, 0.0)
    return loss, z_term, lse


def backward(
    grad: Tensor,  # [M], of each position's loss
    logits: Tensor,  # [M, K]
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,  # [2, M]
    label_smoothing: float,
    z_loss: float,
    dlogits: Tensor,  # [M, K], to be written
) -> None:
    """Write the gradient of the logits."""
    dlogits.copy_(_gradient(grad, logits, tokens, mask, lse, label_smoothing, z_loss))


def _gradient(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """[M, K], in the accumulation dtype."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    colors = logits.shape[1]
    valid = (tokens >= 0) & (tokens < colors)
    gradient = softmax(logits)
    if z_loss:
        gradient *= (1 + 2 * z_loss * lse[0])[:, None]
    if label_smoothing:
        gradient -= label_smoothing / colors
    index = tokens.clamp(0, colors - 1)[:, None]
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, label_smoothing - 1))
    gradient *= torch.where(valid, grad, torch.nan)[:, None]
    return gradient if mask is None else gradient.masked_fill_(~mask[:, None], 0.0)


def linear_forward(
    hidden: Tensor,  # [M, C]
    weight: Tensor,  # [K, C]
    bias: Tensor | None,  # [K]
    pixels: Tensor,
    palette: Tensor | None,
    mask: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    keep: bool,
    needs_sum_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Loss, z-loss part, log-sum-exp and token of each position; gradients of the losses' *sum*."""
    tokens = targets(pixels, palette)
    dtype = accumulation_dtype(hidden.dtype)
    loss, z_term = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
    lse = hidden.new_empty((2, len(hidden)), dtype=dtype)
    gradients = _new_gradients(hidden, weight, dtype, needs_sum_grad)
    for part in _chunks(len(hidden)):
        logits = _logits(hidden[part], weight, bias, dtype)
        part_mask = None if mask is None else mask[part]
        loss[part], z_term[part], lse[:, part] = _losses(
            logits, tokens[part], part_mask, label_smoothing, z_loss
        )
        if any(needs_sum_grad):
            ones = torch.ones_like(loss[part])
            gradient = _gradient(
                ones, logits, tokens[part], part_mask, lse[:, part], label_smoothing, z_loss
            )
            _accumulate(gradients, part, gradient, hidden, weight, part_mask, needs_sum_grad)
    return loss, z_term, *((lse, tokens) if keep else (lse[:, :0], tokens[:0])), *gradients


def linear_backward(
    grad: Tensor,  # [M]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,  # [2, M]
    label_smoothing: float,
    z_loss: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias from each position's upstream gradient; logits are computed anew."""
    dtype = accumulation_dtype(hidden.dtype)
    gradients = _new_gradients(hidden, weight, dtype, needs_grad)
    for part in _chunks(len(hidden)):
        logits = _logits(hidden[part], weight, bias, dtype)
        part_mask = None if mask is None else mask[part]
        gradient = _gradient(
            grad[part], logits, tokens[part], part_mask, lse[:, part], label_smoothing, z_loss
        )
        _accumulate(gradients, part, gradient, hidden, weight, part_mask, needs_grad)
    return gradients


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits.add_(bias.to(dtype))


def _new_gradients(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needed[0] else 0),
        weight.new_zeros(weight.shape if needed[1] else 0, dtype=dtype),
        weight.new_zeros(len(weight) if needed[2] else 0, dtype=dtype),
    )


def _accumulate(
    gradients: tuple[Tensor, Tensor, Tensor],
    part: slice,
    gradient: Tensor,  # [m, K]
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor | None,  # [m]
    needed: Sequence[bool],
) -> None:
    dhidden, dweight, dbias = gradients
    if needed[0]:
        dhidden[part] = (gradient @ weight.to(gradient.dtype)).to(dhidden.dtype)
    if needed[1]:
        counted = hidden[part].to(gradient.dtype)
        if mask is not None:
            counted = counted.masked_fill(~mask[:, None], 0.0)  # zero times NaN would be NaN
        dweight.addmm_(gradient.T, counted)
    if needed[2]:
        dbias += gradient.sum(0)


IMPLEMENTATION = Implementation(forward, backward, linear_forward, linear_backward)
