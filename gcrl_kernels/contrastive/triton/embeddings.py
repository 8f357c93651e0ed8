"""The Triton kernels that go over embeddings once: to pack them, and to finish their gradients.

Packed are [rows + SPARE, WIDTH] in the dtype of what was given, normalised where that is asked for
(in float32, then rounded); zeros after the last row and after D, so that the tiles need no masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcrl_kernels.contrastive.reference import EPSILON
from gcrl_kernels.triton_common import narrow

LEAST_NORM = tl.constexpr(EPSILON)


@triton.jit
def load_given(given, row, features, count, stride, D: tl.constexpr):
    """float32 [rows, features] of a tensor [count, D]; zero beyond."""
    where = given + row.to(tl.int64)[:, None] * stride + features[None, :]
    inside = (row < count)[:, None] & (features < D)[None, :]
    return tl.load(where, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def divisor(norm):
    return tl.where(norm < LEAST_NORM, LEAST_NORM, norm)


@triton.jit(do_not_specialize=["count", "first", "rows"])
def pack_kernel(
    given,  # [count, D]
    packed,  # to be written from row `first` on
    norms,  # float32, likewise
    stride,
    count,
    first,
    rows,  # to be written: those of `given`, and what is to follow them
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = first + row
    squares = tl.zeros((ROWS,), tl.float32)
    if NORMALIZE:
        for begin in range(0, D, CHUNK):
            values = load_given(given, row, begin + tl.arange(0, CHUNK), count, stride, D)
            squares += tl.sum(values * values, 1)
    norm = tl.sqrt_rn(squares)
    there = row < rows
    tl.store(norms + place, norm, mask=there)
    for begin in range(0, WIDTH, CHUNK):
        features = begin + tl.arange(0, CHUNK)
        values = load_given(given, row, features, count, stride, D)
        if NORMALIZE:
            values = tl.div_rn(values, tl.broadcast_to(divisor(norm)[:, None], (ROWS, CHUNK)))
        where = packed + place.to(tl.int64)[:, None] * WIDTH + features[None, :]
        tl.store(where, narrow(values, packed.dtype.element_ty), mask=there[:, None])


@triton.jit(do_not_specialize=["count", "first"])
def finish_kernel(
    pull,  # float32 [rows + SPARE, WIDTH], Σ_k W_ik z_k: those from row `first` on
    given,  # [count, D]
    norms,  # float32, from `first` on
    scale,
    scale_value,
    unit,  # of the pull, or None
    gradient,  # [count, D], to be written; contiguous
    stride,
    count,
    first,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = first + row
    factor = scale_value
    if scale is not None:
        factor = tl.load(scale)
    if unit is not None:
        factor *= tl.load(unit)
    there = row < count
    norm = tl.load(norms + place, mask=there, other=1.0)
    length = tl.broadcast_to(divisor(norm)[:, None], (ROWS, CHUNK))
    radial = tl.zeros((ROWS,), tl.float32)
    if NORMALIZE:
        for begin in range(0, D, CHUNK):
            features = begin + tl.arange(0, CHUNK)
            where = pull + place.to(tl.int64)[:, None] * WIDTH + features[None, :]
            dz = tl.load(where, mask=there[:, None], other=0.0) * factor
            z = tl.div_rn(load_given(given, row, features, count, stride, D), length)
            radial += tl.sum(z * dz, 1)
        radial = tl.where(norm < LEAST_NORM, 0.0, radial)  # it was divided by the constant
    for begin in range(0, D, CHUNK):
        features = begin + tl.arange(0, CHUNK)
        where = pull + place.to(tl.int64)[:, None] * WIDTH + features[None, :]
        dz = tl.load(where, mask=there[:, None], other=0.0) * factor
        if NORMALIZE:
            z = tl.div_rn(load_given(given, row, features, count, stride, D), length)
            dz = tl.div_rn(dz - z * radial[:, None], length)
        to = gradient + row.to(tl.int64)[:, None] * D + features[None, :]
        inside = there[:, None] & (features < D)[None, :]
        tl.store(to, narrow(dz, gradient.dtype.element_ty), mask=inside)
