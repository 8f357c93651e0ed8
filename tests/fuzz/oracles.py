"""What the functions compute, in plain PyTorch and in the dtype of the floats that are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize


def truth(mask: Tensor) -> Tensor:
    """Of any bytes."""
    return mask.view(torch.uint8) != 0


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axis: int,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    place = int(axis) % (q.dim() - 3) + 1
    q, k, v = (tensor.movedim(place, -2) for tensor in (q, k, v))  # [B, *rest, heads, N, D]
    length = q.shape[-2]
    allowed = torch.ones(length, length, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    if mask is not None:
        keys = truth(mask).movedim(place, -1)[..., None, :]
        k, v = (tensor.where(keys[..., None], 0) for tensor in (k, v))
        allowed = allowed & keys[..., None, :]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else float(scale))
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    allowed = allowed.expand(scores.shape)
    alone = ~allowed.any(-1, keepdim=True)
    # Rows without a key are softened over all, and then taken out: no gradient is NaN.
    p = scores.masked_fill(~allowed & ~alone, -torch.inf).softmax(-1).masked_fill(alone, 0)
    out = (p @ v).movedim(-2, place)
    lse = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1).movedim(-1, place)
    return (out, lse) if return_lse else out


def axial_attention_packed(qkv: Tensor, axis: int, **options: Any) -> Any:
    return axial_attention(*qkv.unbind(-3), axis, **options)


def distances(pixels: Tensor, palette: Tensor) -> np.ndarray:
    """Squared, [..., K]: exact for integers, of which no sum is too large for Python."""
    whole = not (pixels.is_floating_point() or palette.is_floating_point())
    to = np.dtype(object) if whole else np.dtype(np.float64)
    difference = pixels.double().numpy()[..., None, :] - palette.double().numpy()
    if whole:  # float64 holds every pixel and colour, and their difference
        difference = np.frompyfunc(int, 1, 1)(difference) if difference.size else difference
    return np.square(difference.astype(to)).sum(-1)


def quantize_colors(pixels: Tensor, palette: Tensor) -> Tensor:
    """The lowest of the nearest; NaN colours are never that, and NaN pixels -1."""
    every = distances(pixels, palette)
    if not every.size:
        return torch.empty(every.shape[:-1], dtype=torch.int64)
    if every.dtype != object:
        every = np.where(np.isnan(every), np.inf, every)
    nearest = torch.as_tensor(np.asarray(every.argmin(-1), dtype=np.int64))
    return nearest.masked_fill(pixels.isnan().any(-1), -1)


def color_cross_entropy(
    logits: Tensor,
    pixels: Tensor,
    palette: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    inplace_backward: bool = False,
) -> Any:
    if tokens is None:
        tokens = pixels.long() if palette is None else quantize_colors(pixels, palette)
    counts = torch.ones_like(tokens, dtype=torch.bool) if mask is None else truth(mask)
    logits, colors = logits.where(counts[..., None], 0), logits.shape[-1]
    known = (tokens >= 0) & (tokens < colors)
    log_p, lse = logits.log_softmax(-1), logits.logsumexp(-1)
    share = float(label_smoothing)
    target = log_p.gather(-1, tokens.where(known, 0)[..., None])[..., 0]
    z_term = float(z_loss) * lse.square()
    loss = -(1 - share) * target - share * log_p.mean(-1) + z_term
    loss = loss.where(known, torch.nan).where(counts, 0)
    z_term = z_term.where(counts, 0)
    both = [reduced(each, reduction, counts) for each in (loss, z_term)]
    return tuple(both) if return_z_loss else both[0]


def reduced(losses: Tensor, reduction: str, counts: Tensor) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def linear_color_cross_entropy(
    hidden: Tensor, weight: Tensor, pixels: Tensor, palette: Tensor | None = None,
    bias: Tensor | None = None, **options: Any,
) -> Any:  # fmt: skip
    mask = options.get("mask")
    if mask is not None:
        hidden = hidden.where(truth(mask)[..., None], 0)
    return color_cross_entropy(linear(hidden, weight, bias), pixels, palette, **options)


def contrastive(
    z: Tensor,
    positive: Tensor,  # bool [n, n]: an anchor's loss is the mean over its positives
    candidates: Tensor,  # bool [n, n]
    scale: Tensor | float,
    unit: bool,
    reduction: str,
    negatives: Tensor | None,
    counts: Tensor,
) -> Tensor:
    columns = z if negatives is None else torch.cat([z, negatives.detach()])
    if unit:
        z, columns = normalize(z, dim=1), normalize(columns, dim=1)
    scores = z @ columns.T * scale
    further = torch.ones(len(z), len(columns) - len(z), dtype=torch.bool)
    lse = scores.masked_fill(~torch.cat([candidates, further], 1), -torch.inf).logsumexp(1)
    share = positive / positive.sum(1, keepdim=True).clamp_min(1)
    each = (lse[:, None] - scores[:, : len(z)]).where(positive, 0)
    losses = (each * share).sum(1)
    return reduced(losses, reduction, counts)


def of_views(
    candidates: Callable[[Tensor, Tensor], Tensor],
    z0: Tensor,
    z1: Tensor,
    scale: Tensor | float,
    normalize: bool,
    reduction: str,
    negatives: Tensor | None = None,
) -> Tensor:
    image = torch.arange(len(z0)).repeat(2)
    oneself = torch.eye(len(image), dtype=torch.bool)
    same = image[:, None] == image
    allowed = candidates(same, oneself)
    counts = torch.ones(len(image), dtype=torch.bool)
    z = torch.cat([z0, z1])
    options = (scale, normalize, reduction, negatives, counts)
    return contrastive(z, same & ~oneself, allowed, *options)


def inverse(temperature: Any) -> Any:
    if isinstance(temperature, Tensor):
        return 1 / temperature.reshape(())
    return 1 / float(temperature)


def nt_xent(z0: Tensor, z1: Tensor, temperature: Any, **options: Any) -> Tensor:
    return of_views(lambda same, oneself: ~oneself, z0, z1, inverse(temperature), **options)


def dcl(z0: Tensor, z1: Tensor, temperature: Any, **options: Any) -> Tensor:
    return of_views(lambda same, oneself: ~same, z0, z1, inverse(temperature), **options)


def info_nce(a: Tensor, b: Tensor, logit_scale: Any, bias: Any = None, **options: Any) -> Tensor:
    half = torch.arange(2 * len(a)) < len(a)
    scale = logit_scale.reshape(()) if isinstance(logit_scale, Tensor) else float(logit_scale)
    return of_views(lambda same, oneself: half[:, None] != half, a, b, scale, **options)


def supcon(
    z: Tensor, labels: Tensor, temperature: Any, normalize: bool, reduction: str,
    negatives: Tensor | None = None,
) -> Tensor:  # fmt: skip
    oneself = torch.eye(len(z), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~oneself
    options = (inverse(temperature), normalize, reduction, negatives, positive.any(1))
    return contrastive(z, positive, ~oneself, *options)


def self_attention(
    x: Tensor, heads: int, axis: int, weights: list[Tensor], **options: Any
) -> Tensor:
    into, into_bias, out, out_bias = weights
    qkv = linear(x, into, into_bias).unflatten(-1, (3, heads, -1))
    return linear(axial_attention_packed(qkv, axis, **options).flatten(-2), out, out_bias)


def with_bank(out0: Tensor, out1: Tensor, temperature: float, bank: Tensor) -> Tensor:
    """The anchors are out0's rows, their negatives the bank's."""
    a, b, bank = normalize(out0, dim=1), normalize(out1, dim=1), normalize(bank, dim=1)
    scores = torch.cat([(a * b).sum(1, keepdim=True), a @ bank.T], 1) / float(temperature)
    return -scores.log_softmax(1)[:, 0].mean()
