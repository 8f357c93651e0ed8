"""What the Triton kernels of axial attention share: where a row lies, its loads, its products.

A row is one head of one line of the grid. Lines are numbered over the dimensions that are not
attended along, merged where every tensor's strides allow it (at most three remain); the heads of a
line are neighbours. `sizes` are those of the second and third of these dimensions, and a tensor's
`strides` go over the three, the heads, and along the row. They come in units of UNIT elements, the
largest power of two of at most 16 bytes that divides them all, so that the compiler knows how wide
its loads may be.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcrl_kernels.triton_common import dot, narrow, rounded, two_sum


@triton.jit
def line_offset(line, sizes, strides, LINE_DIMS: tl.constexpr):
    """Of a line's first element, from its number."""
    line = tl.cast(line, tl.int32)  # a loop's counter is Python's where it is interpreted
    offset = tl.zeros((), tl.int64)
    if LINE_DIMS == 3:
        offset += (line % sizes[1]).to(tl.int64) * strides[2]
        line = line // sizes[1]
    if LINE_DIMS >= 2:
        offset += (line % sizes[0]).to(tl.int64) * strides[1]
        line = line // sizes[0]
    return offset + line.to(tl.int64) * strides[0]


@triton.jit
def row_offset(line, head, sizes, strides, LINE_DIMS: tl.constexpr):
    """Of a row's first element, from the numbers of its line and its head."""
    return line_offset(line, sizes, strides, LINE_DIMS) + head.to(tl.int64) * strides[3]


@triton.jit
def pointers(tensor, offset, strides, positions, features, UNIT: tl.constexpr):
    """[positions, features] of the row at `offset`."""
    rows = tensor + offset * UNIT + positions.to(tl.int64)[:, None] * strides[4] * UNIT
    return rows + features[None, :]


@triton.jit
def load(
    tensor,
    offset,
    strides,
    positions,
    features,
    length,
    allowed,  # bool [positions], or None; what is not may hold anything, as 0 * NaN is NaN
    D: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,  # every position is within the length
):
    """[positions, features] of the row at `offset`, zero beyond the length and D."""
    where = pointers(tensor, offset, strides, positions, features, UNIT)
    if allowed is not None:
        inside = allowed[:, None]
        if features.shape[0] != D:
            inside = inside & (features[None, :] < D)
        values = tl.load(where, mask=inside, other=0.0)
    elif WHOLE and features.shape[0] == D:
        values = tl.load(where)
    elif WHOLE:
        values = tl.load(where, mask=features[None, :] < D, other=0.0)
    elif features.shape[0] == D:
        values = tl.load(where, mask=positions[:, None] < length, other=0.0)
    else:
        inside = (positions[:, None] < length) & (features[None, :] < D)
        values = tl.load(where, mask=inside, other=0.0)
    return values


@triton.jit
def store(
    values,  # float32 [positions, features]
    tensor,
    offset,
    strides,
    positions,
    features,
    length,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write [positions, features] of the row at `offset`."""
    where = pointers(tensor, offset, strides, positions, features, UNIT)
    values = narrow(values, tensor.dtype.element_ty)
    if WHOLE and features.shape[0] == D:
        tl.store(where, values)
    elif WHOLE:
        tl.store(where, values, mask=features[None, :] < D)
    elif features.shape[0] == D:
        tl.store(where, values, mask=positions[:, None] < length)
    else:
        inside = (positions[:, None] < length) & (features[None, :] < D)
        tl.store(where, values, mask=inside)


@triton.jit
def lse_pointers(lse, offset, strides, positions, D: tl.constexpr, UNIT: tl.constexpr):
    """Where a row's log-sum-exps lie, from the offset and strides of the output, contiguous too."""
    step = (tl.zeros((), tl.int64) + strides[4]) * UNIT // D
    return lse + offset * UNIT // D + positions * step


@triton.jit
def load_lse(lse, lost, offset, strides, queries, length, D: tl.constexpr, UNIT: tl.constexpr):
    """A row's log-sum-exps, and what their rounding lost; 0 where there is no key, infinite beyond
    the length.

    exp(score - lse) is then zero for a query that has no key, or that is none.
    """
    inside = queries < length
    where = lse_pointers(lse, offset, strides, queries, D, UNIT)
    values = tl.load(where, mask=inside, other=float("inf"))
    values = tl.where(values == float("-inf"), 0.0, values)
    where = lse_pointers(lost, offset, strides, queries, D, UNIT)
    return values, tl.load(where, mask=inside, other=0.0)


@triton.jit
def probabilities(s, lse, lost):
    """The softmax of scores [queries, keys], from the queries' log-sum-exps."""
    return tl.exp((s - lse[:, None]) - lost[:, None])


@triton.jit
def store_lse(
    highest,  # float32 [queries], of the scores; 0 where there is no key
    total,  # float32 [queries], Σ exp(score - highest)
    lse,
    lost,
    offset,
    strides,
    queries,
    length,
    D: tl.constexpr,
    UNIT: tl.constexpr,
):
    value, rest = two_sum(highest, tl.log(total))
    inside = queries < length
    tl.store(lse_pointers(lse, offset, strides, queries, D, UNIT), value, mask=inside)
    tl.store(lse_pointers(lost, offset, strides, queries, D, UNIT), rest, mask=inside)


@triton.jit
def load_mask(mask, line, sizes, strides, keys, length, LINE_DIMS: tl.constexpr):
    """Whether each key of a line may be attended to; those beyond the length may not.

    The mask's bytes are read: all but 0 are true.
    """
    where = mask + line_offset(line, sizes, strides, LINE_DIMS)
    return tl.load(where + keys.to(tl.int64) * strides[4], mask=keys < length, other=0) != 0


@triton.jit
def scores(
    q,  # [queries, D]
    k,  # [keys, D]
    bias,  # float32 [heads, N, N], or None
    allowed,  # bool [keys], or None
    head,
    queries,
    keys,
    length,
    scale,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale q kᵀ + bias, [queries, keys]; -inf where a query may not attend to a key."""
    zeros = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    products = dot(q, tl.trans(k), zeros, PRECISION)
    if bias is not None:
        where = bias + head.to(tl.int64) * length * length
        where += queries[:, None] * length + keys[None, :]
        if WHOLE:
            added = tl.load(where)
        else:
            inside = (queries[:, None] < length) & (keys[None, :] < length)
            added = tl.load(where, mask=inside, other=0.0)
        s = rounded(products, scale, added)
    else:
        s = rounded(products, scale, 0.0)
    if CAUSAL:
        s = tl.where(queries[:, None] >= keys[None, :], s, float("-inf"))
    if allowed is not None:
        s = tl.where(allowed[None, :], s, float("-inf"))
    elif not WHOLE:
        s = tl.where(keys[None, :] < length, s, float("-inf"))
    return s


@triton.jit
def hidden_zero(lines, line):
    """0, which the compiler cannot know to be 0, and to be the same for every line.

    A loop over lines would otherwise keep the addresses in all tensors in registers.
    """
    return tl.multiple_of(tl.minimum(lines - line, 0), 16)


@triton.jit
def store_dbias(values, partial, part, head, heads, queries, keys, length):
    """Write a tile of a program's share of the bias's gradient."""
    where = partial + (part * heads + head).to(tl.int64) * length * length
    where += queries[:, None] * length + keys[None, :]
    tl.store(where, values, mask=(queries[:, None] < length) & (keys[None, :] < length))
