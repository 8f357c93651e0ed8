"""What a backend brings for the losses, on M positions in one dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Implementation(NamedTuple):
    """Four functions. Losses are [M] and lse is [2, M], contiguous: the log-sum-exps, then what
    their rounding lost; both in the accumulation dtype. Tokens are int64 [M].

    The targets are pixels [M, 3] and a palette [K, 3], or tokens [M] of any integers and None;
    masks are bool [M] or None. Inputs have any strides, results are contiguous.

        forward(logits [M, K], pixels, palette, mask, label_smoothing, z_loss)
            -> loss, its z-loss part, lse, tokens
        backward(grad [M], logits, tokens, mask, lse, label_smoothing, z_loss, dlogits [M, K])
            writes dlogits, which may be the logits themselves
        linear_forward(hidden [M, C], weight [K, C], bias [K] or None, pixels, palette, mask,
                       label_smoothing, z_loss, keep, needs_sum_grad)
            -> loss, its z-loss part, lse, tokens, dhidden, dweight, dbias
            lse is [2, 0] and tokens [0] unless `keep`; the gradients are of the losses' sum, in
            hidden's dtype, then in the accumulation dtype twice; each is [0] unless
            needs_sum_grad has it
        linear_backward(grad [M], hidden, weight, bias, tokens, mask, lse, label_smoothing, z_loss,
                        needs_grad)
            -> dhidden, dweight, dbias, likewise
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., None]
    linear_forward: Callable[..., tuple[Tensor, ...]]
    linear_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
