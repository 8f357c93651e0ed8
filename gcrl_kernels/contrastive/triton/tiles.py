"""What the forward and the backward Triton kernel share: who meets whom, and their scores."""

from __future__ import annotations

import triton
import triton.language as tl

from gcrl_kernels.triton_common import dot

# Which columns of its own batch a row does not take for candidates.
NOBODY = tl.constexpr(0)
ITSELF = tl.constexpr(1)
BOTH_VIEWS = tl.constexpr(2)


@triton.jit
def extent(tile, rows, columns, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """Of a program's tile of rows: its first row, their end, and the columns that they meet.

    HALVES: each half of the rows meets the other one.
    """
    if not HALVES:
        return tile * ROWS, rows, 0, columns
    half = rows // 2
    tiles = tl.cdiv(half, ROWS)
    of_half = tile // tiles
    begin = (1 - of_half) * half
    return of_half * half + tile % tiles * ROWS, of_half * half + half, begin, begin + half


@triton.jit
def partner_of(row, rows):
    """The other view of the same image."""
    half = rows // 2
    return tl.where(row < half, row + half, row - half)


@triton.jit
def load(z, place, features, WIDTH: tl.constexpr):
    """[places, features] of packed embeddings."""
    return tl.load(z + place.to(tl.int64)[:, None] * WIDTH + features[None, :])


@triton.jit
def similarities(
    rows,
    row,
    row_tile,  # where it is held whole, that is where D is at most CHUNK; else None
    columns,
    column,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z_i·z_k, float32 [rows, columns]."""
    product = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    features = tl.arange(0, CHUNK)
    if D <= CHUNK:
        column_tile = load(columns, column, features, WIDTH)
        product = dot(row_tile, tl.trans(column_tile), product, PRECISION)
    else:
        for begin in range(0, D, CHUNK):
            row_part = load(rows, row, begin + features, WIDTH)
            column_part = load(columns, column, begin + features, WIDTH)
            product = dot(row_part, tl.trans(column_part), product, PRECISION)
    return product


@triton.jit
def candidates(column, end, row, own, rows, EXCLUDED: tl.constexpr):
    """Which columns are candidates of a row whose batch begins at column `own`."""
    chosen = (column < end)[None, :]
    if EXCLUDED != NOBODY:
        chosen = chosen & (column[None, :] != (own + row)[:, None])
    if EXCLUDED == BOTH_VIEWS:
        chosen = chosen & (column[None, :] != (own + partner_of(row, rows))[:, None])
    return chosen


@triton.jit
def same_class(classes, row, column, rows, end):
    """Which columns of the own batch are a row's positives, by their classes."""
    of_rows = tl.load(classes + row, mask=row < rows, other=0)
    of_columns = tl.load(classes + column, mask=column < end, other=-1)  # which no class is
    return (of_rows[:, None] == of_columns[None, :]) & (row[:, None] != column[None, :])
