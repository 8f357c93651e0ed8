"""From kernels that write into given tensors to what the operators need, the linear form included.

Such kernels are two functions, the same for every backend:

    forward(logits, pixels, palette, mask, label_smoothing, z_loss,
            loss, z_term, lse, tokens, gradient)
    backward(grad, logits, tokens, mask, lse, label_smoothing, z_loss, gradient)

pixels are [M, 3], or without a palette tokens [M]; mask is bool [M]; loss, z_term and grad are
float32 [M], lse is float32 [2, M], the log-sum-exps and what their rounding lost, tokens int64 [M].
`gradient` is that of the *sum* of the losses, or of their sum weighted by grad, [M, K] as the
logits, and may be the logits themselves. lse, tokens and gradient may be None, and are not written
then. Logits, gradient and grad have any strides, and so has lse from its first row to its second;
the others are contiguous.

The linear form goes over chunks of positions, whose logits, and then the logits' gradients, lie in
one buffer between the products of the linear algebra that PyTorch has: small enough for a GPU's L2
cache, whatever the number of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gcrl_kernels.color_cross_entropy.implementation import Implementation

MOST_ROWS = 8192  # of a chunk
MOST_BYTES = 22 << 20  # of a chunk's logits, and of its hidden rows where they are masked
MOST_POSITIONS = 1 << 19  # whose tokens and losses are stored, where they are not asked for


Quantizer = Callable[[Tensor, Tensor], Tensor]
Kernel = Callable[..., None]


def quantizer(kernel: Kernel) -> Quantizer:
    """Of a kernel(pixels [M, 3], palette, nearest) that writes int64 [M]."""

    def quantize_colors(pixels: Tensor, palette: Tensor) -> Tensor:
        nearest = pixels.new_empty(pixels.shape[:-1], dtype=torch.int64)
        kernel(pixels.reshape(-1, 3).contiguous(), palette, nearest.view(-1))
        return nearest

    return quantize_colors


def implementation(
    quantize_colors: Quantizer, kernel_forward: Kernel, kernel_backward: Kernel
) -> Implementation:
    """Outputs are allocated here."""

    def forward(
        logits: Tensor, pixels: Tensor, palette: Tensor | None, mask: Tensor | None, *options: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, z_term = (_new_floats(logits) for _ in range(2))
        lse = logits.new_empty((2, len(logits)), dtype=torch.float32)
        tokens = logits.new_empty(len(logits), dtype=torch.int64)
        outputs = loss, z_term, lse, tokens
        targets = pixels.contiguous(), palette, _contiguous(mask)
        kernel_forward(logits, *targets, *options, *outputs, None)
        return outputs

    def backward(
        grad: Tensor, logits: Tensor, tokens: Tensor, mask: Tensor | None, *rest: Any
    ) -> None:
        kernel_backward(grad, logits, tokens, _contiguous(mask), *rest)

    def linear_forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pixels: Tensor,
        palette: Tensor | None,
        mask: Tensor | None,
        label_smoothing: float,
        z_loss: float,
        keep: bool,
        needs_sum_grad: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        chunks = _Chunks(hidden, weight, bias, _contiguous(mask), needs_sum_grad)
        lse = hidden.new_empty((2, len(hidden) if keep else 0), dtype=torch.float32)
        losses, z_terms = [], []
        for whole in _parts(len(hidden), len(hidden) if keep else MOST_POSITIONS):
            tokens = _tokens(pixels[whole], palette, quantize_colors)
            loss, z_term = _new_floats(hidden[whole]), _new_floats(hidden[whole])
            for part, logits, part_mask in chunks.of(whole):
                here = slice(part.start - whole.start, part.stop - whole.start)
                kernel_forward(
                    logits,
                    tokens[here],
                    None,
                    part_mask,
                    label_smoothing,
                    z_loss,
                    loss[here],
                    z_term[here],
                    lse[:, part] if keep else None,
                    None,
                    logits if any(needs_sum_grad) else None,
                )
            losses.append(loss if keep else loss.sum()[None])
            z_terms.append(z_term if keep else z_term.sum()[None])
        kept = lse, tokens if keep else tokens[:0]
        return torch.cat(losses), torch.cat(z_terms), *kept, *chunks.gradients

    def linear_backward(
        grad: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
        lse: Tensor,
        label_smoothing: float,
        z_loss: float,
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The logits are computed anew."""
        chunks = _Chunks(hidden, weight, bias, _contiguous(mask), needs_grad)
        for part, logits, part_mask in chunks.of(slice(0, len(hidden))):
            of_part = tokens[part], part_mask, lse[:, part]
            kernel_backward(grad[part], logits, *of_part, label_smoothing, z_loss, logits)
        return chunks.gradients

    return Implementation(forward, backward, linear_forward, linear_backward)


class _Chunks:
    """Parts of the positions, their logits and mask; what comes back is the logits' gradient.

    `gradients` are dhidden in hidden's dtype, dweight and dbias in float32; [0] if not needed.
    """

    def __init__(
        self,
        hidden: Tensor,  # [M, C]
        weight: Tensor,  # [K, C]
        bias: Tensor | None,  # [K]
        mask: Tensor | None,  # bool [M]
        needed: Sequence[bool],
    ) -> None:
        self.hidden, self.weight, self.bias, self.mask = hidden, weight, bias, mask
        self.needed = needed
        colors, features = weight.shape
        masked = mask is not None and needed[1]
        widest = max(colors, features) if masked else colors
        fitting = MOST_BYTES // (widest * hidden.itemsize) // 128 * 128
        self.rows = max(1, min(len(hidden), MOST_ROWS, max(128, fitting)))
        self.logits = hidden.new_empty(self.rows, colors)
        self.counted = hidden.new_empty(self.rows if masked else 0, features)
        self.zero = hidden.new_zeros(())
        self.gradients = (
            hidden.new_empty(hidden.shape if needed[0] else 0),
            weight.new_zeros(weight.shape if needed[1] else 0, dtype=torch.float32),
            weight.new_zeros(colors if needed[2] else 0, dtype=torch.float32),
        )

    def of(self, whole: slice) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        for part in _parts(whole.stop, self.rows, whole.start):
            logits = self.logits[: part.stop - part.start]
            if self.bias is None:
                torch.mm(self.hidden[part], self.weight.T, out=logits)
            else:
                torch.addmm(self.bias, self.hidden[part], self.weight.T, out=logits)
            yield part, logits, None if self.mask is None else self.mask[part]
            self._add(part, logits)

    def _add(self, part: slice, gradient: Tensor) -> None:
        dhidden, dweight, dbias = self.gradients
        if self.needed[0]:
            torch.mm(gradient, self.weight, out=dhidden[part])
        if self.needed[1]:
            hidden = self.hidden[part]
            if self.mask is not None:  # what is left out may be NaN, and 0 * NaN is NaN
                counted = self.counted[: len(hidden)]
                hidden = torch.where(self.mask[part, None], hidden, self.zero, out=counted)
            _add_product(dweight, gradient.T, hidden)
        if self.needed[2]:
            dbias += gradient.sum(0, dtype=dbias.dtype)


def _parts(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """At least one, which may be empty."""
    for begin in range(start, max(stop, start + 1), max(1, size)):
        yield slice(begin, min(begin + size, stop))


def _tokens(pixels: Tensor, palette: Tensor | None, quantize_colors: Quantizer) -> Tensor:
    if palette is None:
        return pixels.to(torch.int64, copy=True).contiguous()
    return quantize_colors(pixels, palette)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _new_floats(tensor: Tensor) -> Tensor:
    return tensor.new_empty(len(tensor), dtype=torch.float32)


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()
