"""The backward Triton kernel of axial attention for a row that is held whole on the chip.

It goes over memory once and does without the output: Σ P ∘ dP comes from the row. The formulas are
in reference.py.
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
def row_gradients(
    grad,
    q,
    k,
    v,
    lse,
    lost,
    dq,
    dk,
    dv,
    bias,
    mask,
    scale,
    line,
    head,
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
    first,
    LINE_DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dq, dk and dv of a row; its dS, [N, N]."""
    positions = first + tl.arange(0, BLOCK)
    features = tl.arange(0, FEATURES)
    zeros = tl.zeros((BLOCK, FEATURES), tl.float32)
    q_row = row_offset(line, head, sizes, q_strides, LINE_DIMS)
    k_row = row_offset(line, head, sizes, k_strides, LINE_DIMS)
    v_row = row_offset(line, head, sizes, v_strides, LINE_DIMS)
    grad_row = row_offset(line, head, sizes, grad_strides, LINE_DIMS)
    out_row = row_offset(line, head, sizes, out_strides, LINE_DIMS)
    q_tile = load(q, q_row, q_strides, positions, features, length, None, D, UNIT, WHOLE)
    allowed = None
    if mask is not None:
        allowed = load_mask(mask, line, sizes, mask_strides, positions, length, LINE_DIMS)
    k_tile = load(k, k_row, k_strides, positions, features, length, allowed, D, UNIT, WHOLE)
    v_tile = load(v, v_row, v_strides, positions, features, length, allowed, D, UNIT, WHOLE)
    do_tile = load(grad, grad_row, grad_strides, positions, features, length, None, D, UNIT, WHOLE)
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
    lse_tile, lost_tile = load_lse(lse, lost, out_row, out_strides, positions, length, D, UNIT)
    p = probabilities(s, lse_tile, lost_tile)
    dv_tile = dot(tl.trans(narrow(p, q_tile.dtype)), do_tile, zeros, PRECISION)
    dv_row = row_offset(line, head, sizes, dv_strides, LINE_DIMS)
    store(dv_tile, dv, dv_row, dv_strides, positions, features, length, D, UNIT, WHOLE)
    dp = dot(do_tile, tl.trans(v_tile), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
    total = tl.sum(p, 1)  # 1, but for the rounding of the log-sum-exp
    delta = tl.sum(p * dp, 1) / tl.where(total == 0.0, 1.0, total)
    ds = p * (dp - delta[:, None])
    narrowed = narrow(ds, q_tile.dtype)
    dq_tile = dot(narrowed, k_tile, zeros, PRECISION) * scale
    dq_row = row_offset(line, head, sizes, dq_strides, LINE_DIMS)
    store(dq_tile, dq, dq_row, dq_strides, positions, features, length, D, UNIT, WHOLE)
    dk_tile = dot(tl.trans(narrowed), q_tile, zeros, PRECISION) * scale
    dk_row = row_offset(line, head, sizes, dk_strides, LINE_DIMS)
    store(dk_tile, dk, dk_row, dk_strides, positions, features, length, D, UNIT, WHOLE)
    return ds


@triton.jit(do_not_specialize=["lines", "parts", "heads", "length"])
def row_kernel(
    grad,
    q,
    k,
    v,
    lse,
    lost,
    dq,
    dk,
    dv,
    partial,  # float32 [parts, heads, N, N], or None
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
    dq_strides,
    dk_strides,
    dv_strides,
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
    """A program computes one row, or where the bias has a gradient every parts-th of a head."""
    if WHOLE:
        length = BLOCK
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    if partial is None:
        row_gradients(
            grad,
            q,
            k,
            v,
            lse,
            lost,
            dq,
            dk,
            dv,
            bias,
            mask,
            scale,
            part,
            head,
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
            0,
            LINE_DIMS,
            UNIT,
            D,
            FEATURES,
            BLOCK,
            WHOLE,
            CAUSAL,
            PRECISION,
        )
    else:
        positions = tl.arange(0, BLOCK)
        dbias = tl.zeros((BLOCK, BLOCK), tl.float32)
        for line in tl.range(part, lines, parts, disable_licm=True):
            dbias += row_gradients(
                grad,
                q,
                k,
                v,
                lse,
                lost,
                dq,
                dk,
                dv,
                bias,
                mask,
                scale,
                line,
                head,
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
                hidden_zero(lines, line),
                LINE_DIMS,
                UNIT,
                D,
                FEATURES,
                BLOCK,
                WHOLE,
                CAUSAL,
                PRECISION,
            )
        store_dbias(dbias, partial, part, head, heads, positions, positions, length)
