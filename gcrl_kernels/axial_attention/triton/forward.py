"""The forward Triton kernels of axial attention.

`row_kernel` holds a row whole on the chip; `tile_kernel` goes over the keys of a longer one with a
running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcrl_kernels.axial_attention.triton.rows import (
    load,
    load_mask,
    row_offset,
    scores,
    store,
    store_lse,
)
from gcrl_kernels.triton_common import dot, narrow


@triton.jit(do_not_specialize=["heads", "length"])
def row_kernel(
    q,
    k,
    v,
    out,
    lse,
    lost,
    bias,
    mask,
    scale,
    heads,
    length,
    sizes,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    mask_strides,
    LINE_DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    FEATURES: tl.constexpr,  # D, padded
    BLOCK: tl.constexpr,  # the length, padded
    WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program computes a row."""
    if WHOLE:
        length = BLOCK
    head = tl.program_id(0) % heads
    line = tl.program_id(0) // heads
    positions = tl.arange(0, BLOCK)
    features = tl.arange(0, FEATURES)
    q_row = row_offset(line, head, sizes, q_strides, LINE_DIMS)
    k_row = row_offset(line, head, sizes, k_strides, LINE_DIMS)
    v_row = row_offset(line, head, sizes, v_strides, LINE_DIMS)
    q_tile = load(q, q_row, q_strides, positions, features, length, None, D, UNIT, WHOLE)
    allowed = None
    if mask is not None:
        allowed = load_mask(mask, line, sizes, mask_strides, positions, length, LINE_DIMS)
    k_tile = load(k, k_row, k_strides, positions, features, length, allowed, D, UNIT, WHOLE)
    v_tile = load(v, v_row, v_strides, positions, features, length, allowed, D, UNIT, WHOLE)
    s = scores(
        q_tile,
        k_tile,
        bias,
        allowed,
        head,
        positions,
        positions,
        length,
        scale,
        CAUSAL,
        WHOLE,
        PRECISION,
    )
    highest = tl.max(s, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # a query without a key
    p = tl.exp(s - highest[:, None])
    total = tl.sum(p, 1)
    zeros = tl.zeros((BLOCK, FEATURES), tl.float32)
    values = dot(narrow(p, v_tile.dtype), v_tile, zeros, PRECISION)
    values = values / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = row_offset(line, head, sizes, out_strides, LINE_DIMS)
    store(values, out, out_row, out_strides, positions, features, length, D, UNIT, WHOLE)
    store_lse(highest, total, lse, lost, out_row, out_strides, positions, length, D, UNIT)


@triton.jit(do_not_specialize=["heads", "length"])
def tile_kernel(
    q,
    k,
    v,
    out,
    lse,
    lost,
    bias,
    mask,
    scale,
    heads,
    length,
    sizes,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    mask_strides,
    LINE_DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    FEATURES: tl.constexpr,
    OWN: tl.constexpr,  # the queries of a program
    OTHER: tl.constexpr,  # the keys it goes over at a time
    WHOLE: tl.constexpr,  # the length is a multiple of OWN and of OTHER
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program computes OWN queries of a row."""
    if WHOLE:
        length = tl.multiple_of(length, 16)
    tiles = tl.cdiv(length, OWN)
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads % tiles * OWN
    line = tl.program_id(0) // heads // tiles
    queries = first + tl.arange(0, OWN)
    features = tl.arange(0, FEATURES)
    q_row = row_offset(line, head, sizes, q_strides, LINE_DIMS)
    k_row = row_offset(line, head, sizes, k_strides, LINE_DIMS)
    v_row = row_offset(line, head, sizes, v_strides, LINE_DIMS)
    q_tile = load(q, q_row, q_strides, queries, features, length, None, D, UNIT, WHOLE)
    highest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    values = tl.zeros((OWN, FEATURES), tl.float32)
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
            queries,
            keys,
            length,
            scale,
            CAUSAL,
            WHOLE,
            PRECISION,
        )
        before = highest
        highest = tl.maximum(before, tl.max(s, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # no key so far
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(before - base)
        total = total * shrink + tl.sum(p, 1)
        values = dot(narrow(p, v_tile.dtype), v_tile, values * shrink[:, None], PRECISION)
    values = values / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = row_offset(line, head, sizes, out_strides, LINE_DIMS)
    store(values, out, out_row, out_strides, queries, features, length, D, UNIT, WHOLE)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    store_lse(base, total, lse, lost, out_row, out_strides, queries, length, D, UNIT)
