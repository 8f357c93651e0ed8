"""Kernels that write into given tensors, as a function to differentiate; the tensors' layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Layout = Callable[[list[Tensor]], list[Tensor]]


def contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def packed(tensors: list[Tensor]) -> list[Tensor]:
    """Parts of one tensor [B, *grid, parts, heads, D]."""
    return list(torch.stack(tensors, -3).unbind(-3))


def sliced(tensors: list[Tensor]) -> list[Tensor]:
    """Some of the positions and features of larger tensors, at multiples of 16 bytes."""
    larger = [torch.nn.functional.pad(tensor, (8, 16, 1, 0, 0, 2)) for tensor in tensors]
    return [tensor[..., :-2, 1:, 8:-16] for tensor in larger]


def misaligned(tensors: list[Tensor]) -> list[Tensor]:
    """Features that begin at odd places, with odd strides between positions."""
    return [torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2] for tensor in tensors]


def turned(tensors: list[Tensor]) -> list[Tensor]:
    """The heads outside the grid and the grid the other way round, in memory."""
    features = tensors[0].dim() - 1
    order = (*reversed(range(features)), features)
    return [tensor.permute(order).contiguous().permute(order) for tensor in tensors]


LAYOUTS: dict[str, Layout] = {
    layout.__name__: layout for layout in (contiguous, packed, sliced, misaligned, turned)
}


def nothing_yet(tensors: list[Tensor], layout: Layout) -> list[Tensor]:
    """Tensors of that layout that hold NaN."""
    return layout([torch.full_like(tensor, torch.nan) for tensor in tensors])


class Attention:
    """Attention through operators `axial_attention` and `axial_attention_backward` of a library.

    Every tensor that the kernels read or write has the layout; what they write holds NaN at first.
    """

    def __init__(
        self,
        library: Any,
        device: str,
        layout: str = "contiguous",
        *,
        axis: int,
        causal: bool = False,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.library, self.device, self.layout = library, device, LAYOUTS[layout]
        self.axis, self.causal, self.scale = axis, causal, scale
        self.mask = None if mask is None else mask.to(device)
        self.lse: Tensor | None = None  # of the last call

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = _Attention.apply(self, q, k, v, bias)
        return out

    def options(self, q: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        bias = None if bias is None else bias.float().contiguous()
        return bias, self.mask, self.axis, self.causal, scale


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: Attention, *inputs: Tensor | None) -> Tensor:
        *tensors, bias = (None if t is None else t.to(attention.device) for t in inputs)
        q, k, v = attention.layout(tensors)
        out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
        lse = torch.full(q.shape[:-1], torch.nan, device=q.device)
        attention.library.axial_attention(q, k, v, *attention.options(q, bias), out, lse)
        ctx.attention = attention
        ctx.save_for_backward(q, k, v, out, lse, bias)
        attention.lse = lse.cpu()
        return out.cpu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *tensors, out, lse, bias = ctx.saved_tensors
        attention = ctx.attention
        (grad,) = attention.layout([grad.to(attention.device)])
        gradients = nothing_yet(tensors, attention.layout)
        dbias = None if bias is None else torch.full(bias.shape, torch.nan, device=grad.device)
        attention.library.axial_attention_backward(
            grad, *tensors, out, lse, *attention.options(grad, bias), *gradients, dbias
        )
        dbias = None if dbias is None else dbias.to(bias.dtype).cpu()
        return None, *(g.contiguous().cpu() for g in gradients), dbias
