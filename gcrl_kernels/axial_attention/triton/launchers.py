"""The launchers of axial attention's Triton kernels; launch.py has their signatures.

A row that fits on the chip goes to a row kernel, a longer one to the tile kernels;
settings.py says which, and how large. All work is on the grid's first dimension.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gcrl_kernels.axial_attention.triton import backward as backward_row
from gcrl_kernels.axial_attention.triton import backward_tiles
from gcrl_kernels.axial_attention.triton import forward as forward_row_or_tiles
from gcrl_kernels.axial_attention.triton.settings import (
    multiprocessors,
    row_setting,
    tile_setting,
)
from gcrl_kernels.triton_common import Setting, as_bytes, generation, launch, padded

MOST_PARTIAL_BYTES = 64 << 20  # of the bias's gradient
WARPS_AT_ONCE = 32  # that a multiprocessor is given of programs that add rows up


def forward(
    q: Tensor,  # [B, *grid, heads, D]
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,  # float32 [heads, N, N]
    mask: Tensor | None,  # bool [B, *grid]
    axis: int,
    causal: bool,
    scale: float,
    out: Tensor,  # to be written; contiguous
    lse: Tensor,  # float32 [2, B, *grid, heads], to be written
) -> None:
    if out.numel() == 0:
        return
    rows = arrange((q, k, v, out), mask, axis)
    which = rows.kind, generation(q.device)
    setting = row_setting("forward", *which, rows.features, rows.length)
    kernel, tiles = forward_row_or_tiles.row_kernel, 1
    if setting is None:
        setting = tile_setting("forward", *which, rows.features)
        kernel = forward_row_or_tiles.tile_kernel
        tiles = triton.cdiv(rows.length, setting.tile[0])
    launch(
        kernel,
        rows.lines * rows.heads * tiles,
        (q, k, v, out, *lse, bias, as_bytes(mask), scale, *rows.numbers, *rows.strides),
        rows.constants(setting, causal),
        setting,
    )


def backward(
    grad: Tensor,  # [B, *grid, heads, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # float32 [2, B, *grid, heads]
    bias: Tensor | None,  # float32 [heads, N, N]
    mask: Tensor | None,  # bool [B, *grid]
    axis: int,
    causal: bool,
    scale: float,
    dq: Tensor,  # to be written
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,  # float32 [heads, N, N], to be written
) -> None:
    if q.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    out = out.contiguous()  # as it is already; the log-sum-exps are found by its strides
    rows = arrange((grad, q, k, v, out, dq, dk, dv), mask, axis)
    which = rows.kind, generation(q.device)
    inputs = grad, q, k, v
    options = bias, as_bytes(mask), scale
    gradients = dq, dk, dv
    places = *rows.numbers, *rows.strides
    setting = row_setting("backward", *which, rows.features, rows.length)
    summing = None  # how the row kernel runs where it adds the bias's gradient up
    if setting is not None and dbias is not None:
        summing = row_setting("backward with dbias", *which, rows.features, rows.length)

    if setting is None:
        setting = tile_setting("backward", *which, rows.features)
        tiles = triton.cdiv(rows.length, setting.tile[0])
        launch(
            backward_tiles.tile_kernel,
            rows.lines * rows.heads * 2 * tiles,
            (*inputs, out, *lse, *gradients, *options, *places),
            rows.constants(setting, causal),
            setting,
        )
    else:
        setting = summing or setting
        parts, partial = rows.lines, None
        if summing is not None and dbias is not None:
            partial = shares(dbias, rows.lines, rows.heads, setting)
            parts = len(partial)
        launch(
            backward_row.row_kernel,
            parts * rows.heads,
            (*inputs, *lse, *gradients, partial, *options, rows.lines, parts, *places),
            rows.constants(setting, causal),
            setting,
        )
        add_up(partial, dbias)

    if dbias is not None and summing is None:
        setting = tile_setting("dbias", *which, rows.features)
        tiles = triton.cdiv(rows.length, setting.tile[0])
        partial = shares(dbias, rows.lines, rows.heads * tiles * tiles, setting)
        parts, of_inputs = len(partial), (*rows.strides[:5], rows.strides[-1])
        launch(
            backward_tiles.bias_kernel,
            parts * rows.heads * tiles * tiles,
            (*inputs, out, *lse, partial, *options, rows.lines, parts, *rows.numbers, *of_inputs),
            rows.constants(setting, causal),
            setting,
        )
        add_up(partial, dbias)


def shares(dbias: Tensor, lines: int, programs: int, setting: Setting) -> Tensor:
    """[parts, heads, N, N] for partial sums over the lines, by `programs` programs a part."""
    at_once = multiprocessors(dbias.device) * WARPS_AT_ONCE // setting.warps
    most = MOST_PARTIAL_BYTES // (4 * dbias.numel())
    parts = max(1, min(lines, most, triton.cdiv(at_once, programs)))
    return dbias[None] if parts == 1 else dbias.new_empty(parts, *dbias.shape)


def add_up(partial: Tensor | None, dbias: Tensor | None) -> None:
    if partial is not None and len(partial) > 1:
        torch.sum(partial, 0, out=dbias)


class Rows(NamedTuple):
    """The rows of a call, and how the kernels find them (rows.py)."""

    lines: int  # each has a row for every head
    heads: int
    length: int
    features: int
    kind: str  # "half" or "single" precision
    precision: str  # of products: "ieee" or "tf32"
    line_dims: int
    sizes: tuple[int, int]
    unit: int
    strides: tuple[tuple[int, ...], ...]  # of each tensor, then of the mask

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self.heads, self.length, self.sizes

    def constants(self, setting: Setting, causal: bool) -> dict[str, Any]:
        tile = setting.tile
        return {
            "LINE_DIMS": self.line_dims,
            "UNIT": self.unit,
            "D": self.features,
            "FEATURES": padded(self.features),
            **({"BLOCK": tile[0]} if len(tile) == 1 else {"OWN": tile[0], "OTHER": tile[1]}),
            "WHOLE": all(self.length % side == 0 for side in tile),
            "CAUSAL": causal,
            "PRECISION": self.precision,
        }


def arrange(tensors: tuple[Tensor, ...], mask: Tensor | None, axis: int) -> Rows:
    dtype, precision = tensors[0].dtype, "ieee"
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    return _arrange(
        tuple(tensors[0].shape),
        tuple(tensor.stride() for tensor in tensors),
        None if mask is None else mask.stride(),
        axis,
        dtype.itemsize,
        precision,
    )


@lru_cache(maxsize=1024)
def _arrange(
    shape: tuple[int, ...],
    tensors_strides: tuple[tuple[int, ...], ...],
    mask_strides: tuple[int, ...] | None,
    axis: int,
    itemsize: int,
    precision: str,
) -> Rows:
    *line_dims, heads, features = range(len(shape))
    line_dims.remove(1 + axis)
    everyone = (*tensors_strides, mask_strides or (0,) * len(shape))

    merged: list[tuple[int, tuple[int, ...]]] = []  # size, and stride of each tensor
    for dim in line_dims:
        size, inner = shape[dim], tuple(strides[dim] for strides in everyone)
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(size * stride for stride in inner):
            merged[-1] = (merged[-1][0] * size, inner)
        else:
            merged.append((size, inner))
    count = prod(size for size, _ in merged)
    dims = max(1, len(merged))
    merged += [(1, (0,) * len(everyone))] * (3 - len(merged))

    def steps(tensor: int, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Over the lines' dimensions, the heads, and along the row; 0 where there is no step."""
        of_heads = strides[heads] if shape[heads] > 1 and tensor < len(tensors_strides) else 0
        along = strides[1 + axis] if shape[1 + axis] > 1 else 0
        return (*(inner[tensor] for _, inner in merged), of_heads, along)

    *all_steps, mask_steps = (steps(index, strides) for index, strides in enumerate(everyone))
    unit = gcd(16 // itemsize, *(step for each in all_steps for step in each))
    return Rows(
        lines=count,
        heads=shape[heads],
        length=shape[1 + axis],
        features=shape[features],
        kind="single" if itemsize == 4 else "half",
        precision=precision,
        line_dims=dims,
        sizes=(merged[1][0], merged[2][0]),
        unit=unit,
        strides=(*(tuple(step // unit for step in each) for each in all_steps), mask_steps),
    )
