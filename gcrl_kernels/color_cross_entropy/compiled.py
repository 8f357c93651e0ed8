"""The compiled kernels of a library, which write into given tensors, as an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcrl_kernels.color_cross_entropy.implementation import Implementation
from gcrl_kernels.color_cross_entropy.reference import distance_dtype


class Compiled:
    """The operators of a namespace of `torch.ops`, on tensors of the dtypes that they take."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def quantize_colors(self, pixels: Tensor, palette: Tensor) -> Tensor:
        colors: Tensor = self.library.quantize_colors(*_comparable(pixels, palette))
        return colors

    def implementation(self) -> Implementation:
        return Implementation(
            self._forward, self._backward, self._linear_forward, self._linear_backward
        )

    @property
    def library(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def _forward(
        self, logits: Tensor, pixels: Tensor, palette: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, z_term = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        lse = logits.new_empty((2, len(logits)), dtype=torch.float32)
        tokens = logits.new_empty(len(logits), dtype=torch.int64)
        results = loss, z_term, lse, tokens
        targets = as_targets(pixels, palette)
        self.library.color_cross_entropy(_readable(logits), *targets, *options, *results)
        return results

    def _backward(self, grad: Tensor, logits: Tensor, *rest: Any) -> None:
        self.library.color_cross_entropy_backward(grad, _readable(logits), *rest)

    def _linear_forward(
        self,
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
        loss, z_term = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        kept = len(hidden) if keep else 0
        lse = hidden.new_empty((2, kept), dtype=torch.float32)
        tokens = hidden.new_empty(kept, dtype=torch.int64)
        gradients = _new_gradients(hidden, weight, needs_sum_grad)
        self.library.linear_color_cross_entropy(
            hidden,
            weight.float(),
            None if bias is None else bias.float(),
            *as_targets(pixels, palette),
            mask,
            label_smoothing,
            z_loss,
            loss,
            z_term,
            lse if keep else None,
            tokens if keep else None,
            *_wanted(gradients, needs_sum_grad),
        )
        return loss, z_term, lse, tokens, *gradients

    def _linear_backward(
        self,
        grad: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *rest_, needs_grad = rest
        gradients = _new_gradients(hidden, weight, needs_grad)
        self.library.linear_color_cross_entropy_backward(
            grad,
            hidden,
            weight.float(),
            None if bias is None else bias.float(),
            *rest_,
            *_wanted(gradients, needs_grad),
        )
        return gradients


def _comparable(pixels: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, in one of the pairs of dtypes that are compared."""
    if pixels.dtype == torch.uint8 and not palette.is_floating_point():
        palette = palette.to(torch.int32)
    else:
        dtype = distance_dtype(pixels, palette)
        pixels, palette = pixels.to(dtype), palette.to(dtype)
    return pixels.contiguous(), palette.contiguous()


def as_targets(pixels: Tensor, palette: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if palette is None:
        return pixels.to(torch.int64).contiguous(), None
    return _comparable(pixels, palette)


def _readable(logits: Tensor) -> Tensor:
    """With the last stride that the kernels take for granted."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _new_gradients(
    hidden: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needed[0] else 0),
        weight.new_empty(weight.shape if needed[1] else 0, dtype=torch.float32),
        weight.new_empty(len(weight) if needed[2] else 0, dtype=torch.float32),
    )


def _wanted(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [tensor if wanted else None for tensor, wanted in zip(tensors, needed, strict=True)]
