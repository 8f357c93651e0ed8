"""The backward Triton kernels of axial attention for a row that is too long to be held whole.

`tile_kernel` computes the gradient of some queries or of some keys a program, and `bias_kernel`
that of the bias, of rows that are held whole too where these leave no room for it. Σ P ∘ dP is
Σ O ∘ dO here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcrl_kernels.axial_attention.triton.rows import (
    hidden_zero,
    load,
    load_lse,
    load_mask,
    probabilities,
    row_offset,
    scores,
    store,
    store_dbias,
)
from gcrl_kernels.triton_common import dot, narrow


@triton.jit
def load_delta(
    out,
    out_row,
    out_strides,
    do_tile,
    queries,
    features,
    length,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Σ O ∘ dO of each query."""
    out_tile = load(out, out_row, out_strides, queries, features, length, None, D, UNIT, WHOLE)
    return tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)


@triton.jit(do_not_specialize=["heads", "length"])
def tile_kernel(
    grad,
    q,
    k,
    v,
    out,
    lse,
    lost,
    dq,
    dk,
    dv,
    bias,
    mask,
    scale,
    heads,
    length,
    sizes,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    mask_strides,
    LINE_DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    FEATURES: tl.constexpr,
    OWN: tl.constexpr,  # the queries, or the keys, that a program computes
    OTHER: tl.constexpr,  # those it goes over at a time
    WHOLE: tl.constexpr,  # the length is a multiple of OWN and of OTHER
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program computes dq of OWN queries of a row, or dk and dv of OWN keys.

    All programs of a line are neighbours, so that its tensors are read from memory once.
    """
    if WHOLE:
        length = tl.multiple_of(length, 16)
    tiles = tl.cdiv(length, OWN)
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % (2 * tiles)
    line = tl.program_id(0) // heads // (2 * tiles)
    first = tile % tiles * OWN
    own = first + tl.arange(0, OWN)
    features = tl.arange(0, FEATURES)
    q_row = row_offset(line, head, sizes, q_strides, LINE_DIMS)
    k_row = row_offset(line, head, sizes, k_strides, LINE_DIMS)
    v_row = row_offset(line, head, sizes, v_strides, LINE_DIMS)
    grad_row = row_offset(line, head, sizes, grad_strides, LINE_DIMS)
    out_row = row_offset(line, head, sizes, out_strides, LINE_DIMS)
    if tile < tiles:
        q_tile = load(q, q_row, q_strides, own, features, length, None, D, UNIT, WHOLE)
        do_tile = load(grad, grad_row, grad_strides, own, features, length, None, D, UNIT, WHOLE)
        delta = load_delta(
            out, out_row, out_strides, do_tile, own, features, length, D, UNIT, WHOLE
        )
        lse_tile, lost_tile = load_lse(lse, lost, out_row, out_strides, own, length, D, UNIT)
        dq_tile = tl.zeros((OWN, FEATURES), tl.float32)
        end = length
        if CAUSAL:
            end = tl.minimum(length, first + OWN)
        for start in range(0, end, OTHER):
            keys = start + tl.arange(0, OTHER)
            allowed = None
            if mask is not None:
                allowed = load_mask(mask, line, sizes, mask_strides, keys, length, LINE_DIMS)
            k_tile = load(k, k_row, k_strides, keys, features, length, allowed, D, UNIT, WHOLE)
            v_tile = load(v, v_row, v_strides, keys, features, length, allowed, D, UNIT, WHOLE)
            s = scores(
                q_tile,
                k_tile,
                bias,
                allowed,
                head,
                own,
                keys,
                length,
                scale,
                CAUSAL,
                WHOLE,
                PRECISION,
            )
            p = probabilities(s, lse_tile, lost_tile)
            dp = dot(do_tile, tl.trans(v_tile), tl.zeros((OWN, OTHER), tl.float32), PRECISION)
            ds = narrow(p * (dp - delta[:, None]), k_tile.dtype)
            dq_tile = dot(ds, k_tile, dq_tile, PRECISION)
        dq_row = row_offset(line, head, sizes, dq_strides, LINE_DIMS)
        store(dq_tile * scale, dq, dq_row, dq_strides, own, features, length, D, UNIT, WHOLE)
    else:
        allowed = None
        if mask is not None:
            allowed = load_mask(mask, line, sizes, mask_strides, own, length, LINE_DIMS)
        k_tile = load(k, k_row, k_strides, own, features, length, allowed, D, UNIT, WHOLE)
        v_tile = load(v, v_row, v_strides, own, features, length, allowed, D, UNIT, WHOLE)
        dk_tile = tl.zeros((OWN, FEATURES), tl.float32)
        dv_tile = tl.zeros((OWN, FEATURES), tl.float32)
        begin = 0
        if CAUSAL:
            begin = first // OTHER * OTHER
        for start in range(begin, length, OTHER):
            queries = start + tl.arange(0, OTHER)
            q_tile = load(q, q_row, q_strides, queries, features, length, None, D, UNIT, WHOLE)
            do_tile = load(
                grad, grad_row, grad_strides, queries, features, length, None, D, UNIT, WHOLE
            )
            delta = load_delta(
                out, out_row, out_strides, do_tile, queries, features, length, D, UNIT, WHOLE
            )
            lse_tile, lost_tile = load_lse(
                lse, lost, out_row, out_strides, queries, length, D, UNIT
            )
            s = scores(
                q_tile,
                k_tile,
                bias,
                allowed,
                head,
                queries,
                own,
                length,
                scale,
                CAUSAL,
                WHOLE,
                PRECISION,
            )
            p = probabilities(s, lse_tile, lost_tile)
            dv_tile = dot(tl.trans(narrow(p, q_tile.dtype)), do_tile, dv_tile, PRECISION)
            dp = dot(do_tile, tl.trans(v_tile), tl.zeros((OTHER, OWN), tl.float32), PRECISION)
            ds = narrow(p * (dp - delta[:, None]), q_tile.dtype)
            dk_tile = dot(tl.trans(ds), q_tile, dk_tile, PRECISION)
        dk_row = row_offset(line, head, sizes, dk_strides, LINE_DIMS)
        store(dk_tile * scale, dk, dk_row, dk_strides, own, features, length, D, UNIT, WHOLE)
        dv_row = row_offset(line, head, sizes, dv_strides, LINE_DIMS)
        store(dv_tile, dv, dv_row, dv_strides, own, features, length, D, UNIT, WHOLE)


@triton.jit(do_not_specialize=["lines", "parts", "heads", "length"])
def bias_kernel(
    grad,
    q,
    k,
    v,
    out,
    lse,
    lost,
    partial,  # float32 [parts, heads, N, N]
    bias,
    mask,
    scale,
    lines,
    parts,
    heads,
    length,
    sizes,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    mask_strides,
    LINE_DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # the length is a multiple of BLOCK
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program sums a tile [BLOCK, BLOCK] of dS over every parts-th row of a head."""
    if WHOLE:
        length = tl.multiple_of(length, 16)
    tiles = tl.cdiv(length, BLOCK)
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % (tiles * tiles)
    part = tl.program_id(0) // heads // (tiles * tiles)
    first_query = tile // tiles * BLOCK
    first_key = tile % tiles * BLOCK
    positions = tl.arange(0, BLOCK)
    features = tl.arange(0, FEATURES)
    dbias = tl.zeros((BLOCK, BLOCK), tl.float32)
    end = lines
    if CAUSAL:
        end = tl.where(first_key <= first_query, lines, 0)
    for line in tl.range(part, end, parts, disable_licm=True):
        first = hidden_zero(lines, line)
        queries = first + first_query + positions
        keys = first + first_key + positions
        q_row = row_offset(line, head, sizes, q_strides, LINE_DIMS)
        k_row = row_offset(line, head, sizes, k_strides, LINE_DIMS)
        v_row = row_offset(line, head, sizes, v_strides, LINE_DIMS)
        grad_row = row_offset(line, head, sizes, grad_strides, LINE_DIMS)
        out_row = row_offset(line, head, sizes, out_strides, LINE_DIMS)
        q_tile = load(q, q_row, q_strides, queries, features, length, None, D, UNIT, WHOLE)
        allowed = None
        if mask is not None:
            allowed = load_mask(mask, line, sizes, mask_strides, keys, length, LINE_DIMS)
        k_tile = load(k, k_row, k_strides, keys, features, length, allowed, D, UNIT, WHOLE)
        v_tile = load(v, v_row, v_strides, keys, features, length, allowed, D, UNIT, WHOLE)
        do_tile = load(
            grad, grad_row, grad_strides, queries, features, length, None, D, UNIT, WHOLE
        )
        delta = load_delta(
            out, out_row, out_strides, do_tile, queries, features, length, D, UNIT, WHOLE
        )
        lse_tile, lost_tile = load_lse(lse, lost, out_row, out_strides, queries, length, D, UNIT)
        s = scores(
            q_tile,
            k_tile,
            bias,
            allowed,
            head,
            queries,
            keys,
            length,
            scale,
            CAUSAL,
            WHOLE,
            PRECISION,
        )
        p = probabilities(s, lse_tile, lost_tile)
        dp = dot(do_tile, tl.trans(v_tile), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
        dbias += p * (dp - delta[:, None])
    queries = first_query + positions
    keys = first_key + positions
    store_dbias(dbias, partial, part, head, heads, queries, keys, length)
