"""The launchers of the colour-quantised cross-entropy's Triton kernels.

launch.py has their signatures. A program holds whole rows, as many as make a tile of ELEMENTS.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcrl_kernels.color_cross_entropy.reference import distance_dtype
from gcrl_kernels.color_cross_entropy.triton.nearest_color import quantize_kernel
from gcrl_kernels.color_cross_entropy.triton.softmax import backward_kernel, forward_kernel
from gcrl_kernels.triton_common import Setting, as_bytes, launch

ELEMENTS = 2048  # logits of a program
MOST_ROWS = 256
QUANTIZER = Setting((64, 16), 4)  # pixels of a program, colours at a time
MOST_COLORS = 256  # of the palette at a time, beside logits


def quantize_colors(
    pixels: Tensor,  # [M, 3], uint8 or floating point
    palette: Tensor,  # [K, 3]
    nearest: Tensor,  # int64 [M], to be written
) -> None:
    if len(nearest) == 0:
        return
    colors, distance = comparable(pixels, palette)
    rows, at_once = QUANTIZER.tile
    launch(
        quantize_kernel,
        triton.cdiv(len(pixels), rows),
        (pixels, colors, nearest, len(pixels), len(palette)),
        {"DISTANCE": distance, "ROWS": rows, "COLORS": at_once},
        QUANTIZER,
    )


def forward(
    logits: Tensor,  # [M, K]
    pixels: Tensor,  # [M, 3], or tokens [M] where there is no palette
    palette: Tensor | None,  # [K, 3]
    mask: Tensor | None,  # bool [M]
    label_smoothing: float,
    z_loss: float,
    loss: Tensor,  # float32 [M], to be written, as those that follow
    z_term: Tensor,
    lse: Tensor | None,  # float32 [2, M]
    tokens: Tensor | None,  # int64 [M]
    gradient: Tensor | None,  # of the sum of the losses, [M, K]; may be the logits
) -> None:
    if len(logits) == 0:
        return
    distance = tl.float32
    if palette is not None:
        palette, distance = comparable(pixels, palette)
    setting, constants = tile_of(logits, label_smoothing)
    constants |= {"DISTANCE": distance, "COLORS": min(setting.tile[1], MOST_COLORS)}
    launch(
        forward_kernel,
        triton.cdiv(len(logits), setting.tile[0]),
        (
            *(logits, pixels, palette, as_bytes(mask), loss, z_term),
            *((None, None) if lse is None else lse),
            *(tokens, gradient),
            *(label_smoothing, z_loss, len(logits), logits.stride()),
            logits.stride() if gradient is None else gradient.stride(),
        ),
        constants,
        setting,
    )


def backward(
    grad: Tensor,  # float32 [M], of the losses
    logits: Tensor,  # [M, K]
    tokens: Tensor,  # int64 [M]
    mask: Tensor | None,  # bool [M]
    lse: Tensor,  # float32 [2, M]
    label_smoothing: float,
    z_loss: float,
    gradient: Tensor,  # to be written; may be the logits
) -> None:
    if len(logits) == 0:
        return
    setting, constants = tile_of(logits, label_smoothing)
    launch(
        backward_kernel,
        triton.cdiv(len(logits), setting.tile[0]),
        (
            *(grad, logits, tokens, as_bytes(mask), *lse, gradient, label_smoothing, z_loss),
            *(len(logits), grad.stride(0), logits.stride(), gradient.stride()),
        ),
        constants,
        setting,
    )


def comparable(pixels: Tensor, palette: Tensor) -> tuple[Tensor, Any]:
    """The palette as the kernels take it, [3, K], and the dtype of the distances to it."""
    distance = tl.float32
    if pixels.dtype != torch.uint8 or palette.is_floating_point():
        if distance_dtype(pixels, palette) == torch.float64:
            distance = tl.float64
    elif palette.dtype.itemsize > 1:
        palette, distance = palette.to(torch.int32), tl.uint64
    return palette.T.contiguous(), distance


def tile_of(logits: Tensor, label_smoothing: float) -> tuple[Setting, dict[str, Any]]:
    """A program's rows and columns, and what both kernels are compiled for."""
    block = triton.next_power_of_2(logits.shape[1])
    rows = max(1, min(MOST_ROWS, ELEMENTS // block))
    return Setting((rows, block), max(4, block // 512)), {
        "K": logits.shape[1],
        "SMOOTH": label_smoothing != 0,
        "ROWS": rows,
        "BLOCK": block,
    }
