"""The forward Triton kernel of the contrastive losses: log-sum-exps with a running maximum.

A program owns a tile of rows and goes over all columns (Milakov and Gimelshein 2018,
arXiv 1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcrl_kernels.contrastive.triton.tiles import (
    NOBODY,
    candidates,
    extent,
    load,
    partner_of,
    same_class,
    similarities,
)
from gcrl_kernels.triton_common import LN2, LOG2E, rounded, two_sum


@triton.jit
def add_scores(
    highest,  # float32 [rows], of the scores so far
    total,  # float32 [rows], Σ exp(score - highest)
    positive,  # float32 [rows], Σ of the scores of the own class
    rows,
    row,
    row_tile,
    row_count,
    columns,
    begin,
    end,
    own,
    classes,
    factor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXCLUDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        product = similarities(rows, row, row_tile, columns, column, D, WIDTH, CHUNK, PRECISION)
        s = rounded(product, factor, 0.0)
        if classes is not None:
            same = same_class(classes, row, column, row_count, end)
            positive += tl.sum(tl.where(same, s, 0.0), 1)
        s = tl.where(candidates(column, end, row, own, row_count, EXCLUDED), s, float("-inf"))
        before = highest
        highest = tl.maximum(before, tl.max(s, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # no candidate so far
        p = tl.exp2((s - base[:, None]) * LOG2E)
        total = total * tl.exp2((before - base) * LOG2E) + tl.sum(p, 1)
    return highest, total, positive


@triton.jit(do_not_specialize=["row_count", "column_count", "further_count", "own"])
def forward_kernel(
    rows,  # packed
    columns,  # packed
    further,  # packed: negatives that are nobody's anchors; or None
    classes,  # int32 [rows], or None
    share,  # float32 [rows], or None
    scale,
    scale_value,
    losses,  # float32 [rows], to be written; or None
    lse,  # float32 [rows], to be written
    rest,  # float32 [rows], to be written: what rounding lse lost
    row_count,
    column_count,
    further_count,
    own,  # the column where the rows' own batch begins
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXCLUDED: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    first, row_end, begin, end = extent(tile, row_count, column_count, ROWS, HALVES)
    row = first + tl.arange(0, ROWS)
    there = row < row_end
    factor = scale_value
    if scale is not None:
        factor = tl.load(scale)
    features = tl.arange(0, CHUNK)
    row_tile = None
    if D <= CHUNK:
        row_tile = load(rows, row, features, WIDTH)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    positive = tl.zeros((ROWS,), tl.float32)
    highest, total, positive = add_scores(
        highest,
        total,
        positive,
        rows,
        row,
        row_tile,
        row_count,
        columns,
        begin,
        end,
        own,
        classes,
        factor,
        D,
        WIDTH,
        COLUMNS,
        CHUNK,
        EXCLUDED,
        PRECISION,
    )
    if further is not None:
        highest, total, positive = add_scores(
            highest,
            total,
            positive,
            rows,
            row,
            row_tile,
            row_count,
            further,
            0,
            further_count,
            own,
            None,
            factor,
            D,
            WIDTH,
            COLUMNS,
            CHUNK,
            NOBODY,
            PRECISION,
        )
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    log_total = tl.log2(total) * LN2
    row_lse, lost = two_sum(highest, log_total)
    tl.store(lse + row, row_lse, mask=there)
    tl.store(rest + row, lost, mask=there)
    if losses is not None:
        if share is None:
            partner = partner_of(row, row_count)
            for chunk in range(0, D, CHUNK):
                view = load(rows, row, chunk + features, WIDTH).to(tl.float32)
                other = load(rows, tl.where(there, partner, 0), chunk + features, WIDTH)
                positive += tl.sum(view * other.to(tl.float32), 1)
            loss = (row_lse - positive * factor) + lost
        else:
            part = tl.load(share + row, mask=there, other=0.0)
            loss = tl.where(part == 0.0, 0.0, (row_lse - positive * part) + lost)
        tl.store(losses + row, loss, mask=there)
