"""The softmax cross-entropy of rows of logits, each held whole by one program: one pass over them.

The formulas are in reference.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcrl_kernels.color_cross_entropy.triton.nearest_color import nearest_color
from gcrl_kernels.triton_common import LOG2E, narrow, two_sum


@triton.jit
def pointers(tensor, row, column, strides):
    """[ROWS, BLOCK] of a tensor [M, K]."""
    return tensor + (row * strides[0])[:, None] + (column.to(tl.int64) * strides[1])[None, :]


@triton.jit
def counted_rows(mask, row, rows):
    """Whether a row is there, and counts."""
    counted = row < rows
    if mask is not None:
        counted = tl.load(mask + row, counted, 0) != 0  # its bytes
    return counted


@triton.jit
def load_logits(logits, row, column, counted, strides, K: tl.constexpr):
    """float32 [ROWS, BLOCK]; -inf beyond K, and in rows that do not count."""
    inside = counted[:, None]
    if column.shape[0] != K:
        inside = inside & (column < K)[None, :]
    where = pointers(logits, row, column, strides)
    return tl.load(where, inside, float("-inf")).to(tl.float32)


@triton.jit
def store_gradient(
    probability,  # float32 [ROWS, BLOCK], times 1 + 2 w lse
    scale,  # float32 [ROWS]
    target,
    counted,
    gradient,
    row,
    rows,
    column,
    strides,
    label_smoothing,
    K: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Write the loss's gradient times `scale`; zero where a row does not count."""
    is_target = column[None, :] == target[:, None]
    values = tl.where(is_target, probability - (1 - label_smoothing), probability)
    if SMOOTH:
        values -= label_smoothing / K
    values = tl.where(counted[:, None], values * scale[:, None], 0.0)
    inside = (row < rows)[:, None]
    if column.shape[0] != K:
        inside = inside & (column < K)[None, :]
    where = pointers(gradient, row, column, strides)
    tl.store(where, narrow(values, gradient.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    logits,
    pixels,  # [M, 3], or tokens [M] where there is no palette
    palette,  # [3, K], or None
    mask,  # uint8 [M], or None
    loss,  # float32 [M], written as the next four
    z_term,  # float32 [M]
    lse,  # float32 [M], or None
    lost,  # float32 [M], what the rounding of lse lost; or None
    tokens,  # int64 [M], or None
    gradient,  # of the sum of the losses, or None; may be the logits
    label_smoothing,
    z_loss,
    rows,
    logits_strides,
    gradient_strides,
    K: tl.constexpr,
    DISTANCE: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # K padded
    COLORS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    counted = counted_rows(mask, row, rows)
    if palette is not None:
        target = nearest_color(pixels, palette, row, row < rows, K, DISTANCE, ROWS, COLORS)
    else:
        target = tl.load(pixels + row, row < rows, 0).to(tl.int64)
    if tokens is not None:
        tl.store(tokens + row, target.to(tl.int64), row < rows)
    valid = (target >= 0) & (target < K)

    z = load_logits(logits, row, column, counted, logits_strides, K)
    highest = tl.max(z, 1)
    z -= highest[:, None]
    exponential = tl.exp2(z * LOG2E)
    total = tl.sum(exponential, 1)
    log_total = tl.log(total)
    row_lse, row_lost = two_sum(highest, log_total)
    # Relative to the highest logit, so that the loss of large ones keeps its precision.
    at_target = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
    row_z_term = z_loss * row_lse * row_lse
    row_loss = log_total - (1 - label_smoothing) * at_target + row_z_term
    if SMOOTH:
        if BLOCK != K:
            row_loss -= label_smoothing / K * tl.sum(tl.where(column[None, :] < K, z, 0.0), 1)
        else:
            row_loss -= label_smoothing / K * tl.sum(z, 1)
    row_loss = tl.where(valid, row_loss, float("nan"))
    tl.store(loss + row, tl.where(counted, row_loss, 0.0), row < rows)
    tl.store(z_term + row, tl.where(counted, row_z_term, 0.0), row < rows)
    if lse is not None:
        tl.store(lse + row, tl.where(counted, row_lse, 0.0), row < rows)
        tl.store(lost + row, tl.where(counted, row_lost, 0.0), row < rows)
    if gradient is not None:
        probability = exponential * ((1 + 2 * z_loss * row_lse) / total)[:, None]
        scale = tl.where(valid, 1.0, float("nan"))
        store_gradient(
            probability,
            scale,
            target,
            counted,
            gradient,
            row,
            rows,
            column,
            gradient_strides,
            label_smoothing,
            K,
            SMOOTH,
        )


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad,  # float32 [M], of the losses; stride 0 where it is one number
    logits,
    tokens,  # int64 [M]
    mask,  # uint8 [M], or None
    lse,  # float32 [M]
    lost,  # float32 [M]
    gradient,  # written; may be the logits
    label_smoothing,
    z_loss,
    rows,
    grad_stride,
    logits_strides,
    gradient_strides,
    K: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    counted = counted_rows(mask, row, rows)
    target = tl.load(tokens + row, counted, 0)
    row_lse = tl.load(lse + row, counted, 0.0)
    row_lost = tl.load(lost + row, counted, 0.0)
    scale = tl.load(grad + row * grad_stride, counted, 0.0)
    z = load_logits(logits, row, column, counted, logits_strides, K)
    z = (z - row_lse[:, None]) - row_lost[:, None]
    probability = tl.exp2(z * LOG2E) * (1 + 2 * z_loss * row_lse)[:, None]
    store_gradient(
        probability,
        tl.where((target >= 0) & (target < K), scale, float("nan")),
        target,
        counted,
        gradient,
        row,
        rows,
        column,
        gradient_strides,
        label_smoothing,
        K,
        SMOOTH,
    )
