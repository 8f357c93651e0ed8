"""From kernels that write into given tensors to what the operators need.

Such a kernel has four functions, the same for every backend:

    contrast(z0, z1, negatives, classes, share, scale, scale_value, candidates, normalize,
             losses, lse)
    contrast_backward(grad, z0, z1, negatives, classes, share, scale, lse, scale_value, candidates,
                      normalize, dz0, dz1, dscale)
    contrast_block_lse(rows, columns, scale, scale_value, candidates, diagonal, lse)
    contrast_block_gradient(rows, row_lse, row_grad, columns, column_lse, column_grad, scale,
                            scale_value, candidates, diagonal, drows, dscale)

Embeddings, and dz0 and dz1, are float16, bfloat16 or float32, rows and columns float32, with a
last stride of 1; the other floating-point tensors are float32 and contiguous. An lse is [2, n] (or
[2, m]): the log-sum-exps, then what their rounding to float32 lost, 0 where one is not finite.
candidates is the place in `CANDIDATES`; diagonal is -1 where the rows' own batch is not among the
columns. dz1 is None where z1 is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcrl_kernels.contrastive.reference import NEGATIVES, OTHER_HALF, OTHERS

CANDIDATES = (OTHERS, NEGATIVES, OTHER_HALF)


class Implementation(NamedTuple):
    """What a backend does for each of the operators."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    block_lse: Callable[..., Tensor]
    block_gradient: Callable[..., tuple[Tensor, Tensor]]


def implementation(library: Callable[[], Any]) -> Implementation:
    """The operators of a library of such kernels; outputs are allocated here."""

    def forward(
        z0: Tensor,
        z1: Tensor | None,
        negatives: Tensor | None,
        classes: Tensor | None,
        share: Tensor | None,
        scale: Tensor | None,
        scale_value: float,
        candidates: str,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        anchors = len(z0) if z1 is None else 2 * len(z0)
        losses, lse = (
            z0.new_empty(shape, dtype=torch.float32) for shape in ((anchors,), (2, anchors))
        )
        library().contrast(
            *_readable(z0, z1, negatives), classes, share, _plain(scale), scale_value,
            CANDIDATES.index(candidates), normalize, losses, lse,
        )  # fmt: skip
        return losses, lse

    def backward(
        grad: Tensor,
        z0: Tensor,
        z1: Tensor | None,
        negatives: Tensor | None,
        classes: Tensor | None,
        share: Tensor | None,
        scale: Tensor | None,
        lse: Tensor,
        scale_value: float,
        candidates: str,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dz0, dscale = z0.new_empty(z0.shape), grad.new_empty(())
        dz1 = None if z1 is None else z1.new_empty(z1.shape)
        library().contrast_backward(
            grad.contiguous(), *_readable(z0, z1, negatives), classes, share, _plain(scale), lse,
            scale_value, CANDIDATES.index(candidates), normalize, dz0, dz1, dscale,
        )  # fmt: skip
        dscale = dscale if scale is None else dscale.to(scale.dtype)
        return dz0, z0.new_empty(0) if dz1 is None else dz1, dscale

    def block_lse(
        rows: Tensor,
        columns: Tensor,
        scale: Tensor | None,
        scale_value: float,
        candidates: str,
        diagonal: int | None,
    ) -> Tensor:
        lse = rows.new_empty(2, len(rows))
        place = -1 if diagonal is None else diagonal
        library().contrast_block_lse(
            *_readable(rows, columns), _plain(scale), scale_value, CANDIDATES.index(candidates),
            place, lse,
        )  # fmt: skip
        return lse

    def block_gradient(
        rows: Tensor,
        row_lse: Tensor,
        row_grad: Tensor,
        columns: Tensor,
        column_lse: Tensor | None,
        column_grad: Tensor | None,
        scale: Tensor | None,
        scale_value: float,
        candidates: str,
        diagonal: int | None,
    ) -> tuple[Tensor, Tensor]:
        drows, dscale = rows.new_empty(rows.shape), rows.new_empty(())
        place = -1 if diagonal is None else diagonal
        row_numbers = _plain(row_lse), _plain(row_grad)
        column_numbers = _plain(column_lse), _plain(column_grad)
        rows, columns = _readable(rows, columns)
        library().contrast_block_gradient(
            rows, *row_numbers, columns, *column_numbers, _plain(scale), scale_value,
            CANDIDATES.index(candidates), place, drows, dscale,
        )  # fmt: skip
        return drows, dscale

    return Implementation(forward, backward, block_lse, block_gradient)


def _readable(*tensors: Any) -> list[Any]:
    """With the last stride that the kernels take for granted."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _plain(tensor: Any) -> Any:
    """float32 and contiguous, as the kernels take it."""
    return None if tensor is None else tensor.float().contiguous()
