"""The backward Triton kernel of the contrastive losses: Σ_k W_ik z_k, without atomics.

A program owns a tile of rows and FEATURES of their gradient, and goes over all columns. W is
rebuilt from both sides' log-sum-exps; the formulas are in reference.py.
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
from gcrl_kernels.triton_common import LOG2E, dot, narrow, rounded

ONE_EXPONENTIAL = tl.constexpr(80.0)  # serves a pair while all log-sum-exps lie as close


@triton.jit
def exponential(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def load_numbers(lse, rest, grad, share, place, there):
    """Of anchors: lse and what its rounding lost, the weights of exp(score - lse) and of their
    positives."""
    of_lse = tl.load(lse + place, mask=there, other=0.0)
    lost = tl.load(rest + place, mask=there, other=0.0)
    pull = tl.load(grad + place, mask=there, other=0.0)
    push = pull
    if share is not None:
        part = tl.load(share + place, mask=there, other=0.0)
        push = pull * part
        pull = tl.where(part == 0.0, 0.0, pull)
    return of_lse, lost, pull, push


@triton.jit
def add_gradients(
    dz,  # float32 [rows, FEATURES] so far
    rows,
    row,
    row_tile,
    row_count,
    row_lse,
    row_rest,
    row_pull,
    row_push,
    columns,
    begin,
    end,
    own,
    lse,  # of the columns, or None: they are nobody's anchors
    rest,
    grad,
    share,
    classes,
    middle,
    one,  # exponential serves both sides
    factor,
    part,  # the first of the features
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    FEATURES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    POSITIVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_near = row_pull * exponential((middle - row_lse) - row_rest)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        product = similarities(rows, row, row_tile, columns, column, D, WIDTH, CHUNK, PRECISION)
        s = rounded(product, factor, 0.0)
        if lse is None:
            w = exponential((s - row_lse[:, None]) - row_rest[:, None]) * row_pull[:, None]
        else:
            column_lse, column_rest, column_pull, column_push = load_numbers(
                lse, rest, grad, share, column, column < end
            )
            if one:
                column_near = column_pull * exponential((middle - column_lse) - column_rest)
                w = exponential(s - middle) * (row_near[:, None] + column_near[None, :])
            else:
                w = exponential((s - row_lse[:, None]) - row_rest[:, None]) * row_pull[:, None]
                of_columns = (s - column_lse[None, :]) - column_rest[None, :]
                w += exponential(of_columns) * column_pull[None, :]
        w = tl.where(candidates(column, end, row, own, row_count, EXCLUDED), w, 0.0)
        if POSITIVES:
            if classes is None:
                positive = column[None, :] == partner_of(row, row_count)[:, None]
            else:
                positive = same_class(classes, row, column, row_count, end)
            w -= tl.where(positive, row_push[:, None] + column_push[None, :], 0.0)
        column_part = load(columns, column, part + tl.arange(0, FEATURES), WIDTH)
        dz = dot(narrow(w, column_part.dtype), column_part, dz, PRECISION)
    return dz


@triton.jit
def dots(rows, row, row_end, dz, part, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """Each row's z · dz, of FEATURES; 0 beyond the last row."""
    view = load(rows, row, part + tl.arange(0, FEATURES), WIDTH).to(tl.float32)
    return tl.where(row < row_end, tl.sum(view * dz, 1), 0.0)


@triton.jit(do_not_specialize=["row_count", "column_count", "further_count", "own"])
def backward_kernel(
    rows,  # packed
    row_lse,  # float32 [rows]
    row_rest,  # float32 [rows], what rounding lse lost
    row_grad,  # float32 [rows], of the losses
    columns,  # packed
    column_lse,  # of the columns, or None: they are nobody's anchors
    column_rest,
    column_grad,
    further,  # packed: negatives that are nobody's anchors; or None
    classes,  # int32 [rows], or None
    share,  # float32 [rows], or None
    scale,
    scale_value,
    least,  # of all log-sum-exps
    most,
    pull,  # float32, packed like the rows: Σ_k W_ik z_k, to be written
    partial,  # float32 [WIDTH / FEATURES, rows], to be written: parts of the scale's gradient
    row_count,
    column_count,
    further_count,
    own,  # the column where the rows' own batch begins
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    FEATURES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    HALVES: tl.constexpr,
    POSITIVES: tl.constexpr,  # are among the columns
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0) // (WIDTH // FEATURES)
    number = tl.program_id(0) % (WIDTH // FEATURES)
    part = number * FEATURES
    first, row_end, begin, end = extent(tile, row_count, column_count, ROWS, HALVES)
    row = first + tl.arange(0, ROWS)
    there = row < row_end
    factor = scale_value
    if scale is not None:
        factor = tl.load(scale)
    low = tl.load(least)
    high = tl.load(most)
    middle = low + (high - low) * 0.5
    one = high - low <= ONE_EXPONENTIAL
    of_lse, of_rest, of_pull, of_push = load_numbers(row_lse, row_rest, row_grad, share, row, there)
    row_tile = None
    if D <= CHUNK:
        row_tile = load(rows, row, tl.arange(0, CHUNK), WIDTH)
    dz = tl.zeros((ROWS, FEATURES), tl.float32)
    dz = add_gradients(
        dz,
        rows,
        row,
        row_tile,
        row_count,
        of_lse,
        of_rest,
        of_pull,
        of_push,
        columns,
        begin,
        end,
        own,
        column_lse,
        column_rest,
        column_grad,
        share,
        classes,
        middle,
        one,
        factor,
        part,
        D,
        WIDTH,
        COLUMNS,
        CHUNK,
        FEATURES,
        EXCLUDED,
        POSITIVES,
        PRECISION,
    )
    total = dots(rows, row, row_end, dz, part, FEATURES, WIDTH)
    if column_lse is not None:
        total *= 0.5  # each of these pairs is met from both sides
    if further is not None:
        before = dots(rows, row, row_end, dz, part, FEATURES, WIDTH)
        dz = add_gradients(
            dz,
            rows,
            row,
            row_tile,
            row_count,
            of_lse,
            of_rest,
            of_pull,
            of_push,
            further,
            0,
            further_count,
            own,
            None,
            None,
            None,
            None,
            None,
            middle,
            one,
            factor,
            part,
            D,
            WIDTH,
            COLUMNS,
            CHUNK,
            FEATURES,
            NOBODY,
            False,
            PRECISION,
        )
        total += dots(rows, row, row_end, dz, part, FEATURES, WIDTH) - before
    features = part + tl.arange(0, FEATURES)
    where = pull + row.to(tl.int64)[:, None] * WIDTH + features[None, :]
    tl.store(where, dz, mask=there[:, None])
    tl.store(partial + number.to(tl.int64) * row_count + row, total, mask=there)
