"""The launchers of the contrastive losses' Triton kernels; launch.py has their signatures.

All work is on the grid's first dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gcrl_kernels.contrastive.launch import CANDIDATES
from gcrl_kernels.contrastive.reference import NEGATIVES, OTHER_HALF
from gcrl_kernels.contrastive.triton.backward import backward_kernel
from gcrl_kernels.contrastive.triton.embeddings import finish_kernel, pack_kernel
from gcrl_kernels.contrastive.triton.forward import forward_kernel
from gcrl_kernels.contrastive.triton.settings import (
    MOST_WEIGHT,
    PACKING,
    SPARE,
    features_at_a_time,
    tile_setting,
)
from gcrl_kernels.contrastive.triton.tiles import BOTH_VIEWS, ITSELF, NOBODY
from gcrl_kernels.triton_common import Setting, generation, launch


def contrast(
    z0: Tensor,  # [N, D]
    z1: Tensor | None,  # [N, D]
    negatives: Tensor | None,  # [M, D]
    classes: Tensor | None,  # int32 [n]
    share: Tensor | None,  # float32 [n]
    scale: Tensor | None,
    scale_value: float,
    candidates: int,
    normalize: bool,
    losses: Tensor,  # float32 [n], to be written
    lse: Tensor,  # float32 [2, n], to be written
) -> None:
    views, further = pack((z0, z1), normalize), pack((negatives,), normalize)
    halves = CANDIDATES[candidates] == OTHER_HALF
    _forward(
        views, views, further, (classes, share, scale, scale_value), losses, lse,
        0, excluded(candidates), halves,
    )  # fmt: skip


def contrast_backward(
    grad: Tensor,  # float32 [n]
    z0: Tensor,
    z1: Tensor | None,
    negatives: Tensor | None,
    classes: Tensor | None,
    share: Tensor | None,
    scale: Tensor | None,
    lse: Tensor,  # float32 [2, n]
    scale_value: float,
    candidates: int,
    normalize: bool,
    dz0: Tensor,  # to be written
    dz1: Tensor | None,
    dscale: Tensor,  # float32, a scalar
) -> None:
    views, further = pack((z0, z1), normalize), pack((negatives,), normalize)
    halves = CANDIDATES[candidates] == OTHER_HALF
    unit = None
    if z0.dtype == torch.float16:  # in which the weights of a large batch would be subnormal
        largest = torch.linalg.vector_norm(grad, torch.inf)
        unit = torch.where(largest > 0, largest, 1.0) / MOST_WEIGHT
        grad = grad / unit
    numbers = (*lse, grad)
    pull, partial = _backward(
        views, numbers, views, numbers, further, (classes, share, scale, scale_value),
        torch.aminmax(lse[0]), 0, excluded(candidates), halves, True,
    )  # fmt: skip
    sum_of(partial, unit, dscale)
    finish(pull, views, (z0, z1), (scale, scale_value, unit), normalize, (dz0, dz1))


def contrast_block_lse(
    rows: Tensor,  # float32 [n, D]
    columns: Tensor,  # float32 [m, D]
    scale: Tensor | None,
    scale_value: float,
    candidates: int,
    diagonal: int,
    lse: Tensor,  # float32 [2, n], to be written
) -> None:
    if len(rows) == 0:
        return
    _forward(
        pack((rows,), False), pack((columns,), False), pack((None,), False),
        (None, None, scale, scale_value), None, lse,
        diagonal, excluded(candidates, diagonal), False,
    )  # fmt: skip


def contrast_block_gradient(
    rows: Tensor,  # float32 [n, D]
    row_lse: Tensor,  # float32 [2, n]
    row_grad: Tensor,  # float32 [n]
    columns: Tensor,  # float32 [m, D]
    column_lse: Tensor | None,  # float32 [2, m]
    column_grad: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    candidates: int,
    diagonal: int,
    drows: Tensor,  # to be written
    dscale: Tensor,  # float32, a scalar
) -> None:
    if len(rows) == 0:
        dscale.zero_()
        return
    packed = pack((rows,), False)
    everyone = row_lse[0] if column_lse is None else torch.cat([row_lse[0], column_lse[0]])
    of_columns = (None, None) if column_lse is None else column_lse
    pull, partial = _backward(
        packed, (*row_lse, row_grad), pack((columns,), False), (*of_columns, column_grad),
        pack((None,), False), (None, None, scale, scale_value), torch.aminmax(everyone),
        diagonal, excluded(candidates, diagonal), False, False,
    )  # fmt: skip
    sum_of(partial, None, dscale)
    finish(pull, packed, (rows,), (scale, scale_value, None), False, (drows,))


class Packed(NamedTuple):
    """Embeddings as the kernels take them (embeddings.py)."""

    z: Tensor | None  # None where there are none
    norms: Tensor | None
    size: int
    features: int


def pack(given: tuple[Tensor | None, ...], normalize: bool) -> Packed:
    """One after the other, in one tensor."""
    tensors = [tensor for tensor in given if tensor is not None and len(tensor) > 0]
    if not tensors:
        return Packed(None, None, 0, 0)
    like, count = tensors[0], sum(map(len, tensors))
    constants, setting = packing(like)
    z = like.new_empty(count + SPARE, constants["WIDTH"])
    norms = like.new_empty(count + SPARE, dtype=torch.float32)
    first, rows = 0, setting.tile[0]
    for tensor in tensors:
        wanted = len(tensor) + (SPARE if first + len(tensor) == count else 0)
        launch(
            pack_kernel,
            triton.cdiv(wanted, rows),
            (tensor, z, norms, tensor.stride(0), len(tensor), first, wanted),
            {"NORMALIZE": normalize, **constants},
            setting,
        )
        first += len(tensor)
    return Packed(z, norms, count, like.shape[1])


def kind_of(tensor: Tensor) -> str:
    return "single" if tensor.dtype == torch.float32 else "half"


def packing(like: Tensor) -> tuple[dict[str, Any], Setting]:
    """How embeddings like these are packed, and by what programs."""
    features = like.shape[1]
    at_a_time = features_at_a_time(kind_of(like), features)
    chunk = min(at_a_time, 128)
    rows = PACKING // chunk
    width = triton.cdiv(features, at_a_time) * at_a_time
    return {"D": features, "WIDTH": width, "ROWS": rows, "CHUNK": chunk}, Setting((rows,), 4)


def excluded(candidates: int, diagonal: int = 0) -> int:
    if diagonal < 0 or CANDIDATES[candidates] == OTHER_HALF:
        return NOBODY.value
    return BOTH_VIEWS.value if CANDIDATES[candidates] == NEGATIVES else ITSELF.value


def tiles_of(count: int, rows: int, halves: bool) -> int:
    return 2 * triton.cdiv(count // 2, rows) if halves else triton.cdiv(count, rows)


def tile_constants(
    direction: str, rows: Packed, excluded: int, halves: bool
) -> tuple[dict[str, Any], Setting]:
    z = rows.z
    assert z is not None
    precision = "ieee"
    if z.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    setting = tile_setting(direction, kind_of(z), generation(z.device), rows.features)
    tile = dict(zip(("ROWS", "COLUMNS", "CHUNK"), setting.tile, strict=True))
    options = {"EXCLUDED": excluded, "HALVES": halves, "PRECISION": precision}
    return {"D": rows.features, "WIDTH": z.shape[1], **tile, **options}, setting


def _forward(
    rows: Packed,
    columns: Packed,
    further: Packed,
    options: tuple[Any, ...],
    losses: Tensor | None,
    lse: Tensor,  # [2, rows]
    own: int,
    excluded: int,
    halves: bool,
) -> None:
    constants, setting = tile_constants("forward", rows, excluded, halves)
    launch(
        forward_kernel,
        tiles_of(rows.size, setting.tile[0], halves),
        (
            *(rows.z, columns.z, further.z, *options, losses, *lse),
            *(rows.size, columns.size, further.size, own),
        ),
        constants,
        setting,
    )


def _backward(
    rows: Packed,
    row_numbers: tuple[Any, ...],  # lse, what its rounding lost, the losses' gradients
    columns: Packed,
    column_numbers: tuple[Any, ...],
    further: Packed,
    options: tuple[Any, ...],
    bounds: tuple[Tensor, ...],  # of all log-sum-exps
    own: int,
    excluded: int,
    halves: bool,
    positives: bool,
) -> tuple[Tensor, Tensor]:
    """Σ_k W_ik z_k, packed, and the parts of the scale's gradient."""
    constants, setting = tile_constants("backward", rows, excluded, halves)
    z = rows.z
    assert z is not None
    at_a_time = features_at_a_time(kind_of(z), rows.features)
    parts = constants["WIDTH"] // at_a_time
    pull = torch.empty_like(z, dtype=torch.float32)
    partial = pull.new_empty(parts, rows.size)
    launch(
        backward_kernel,
        tiles_of(rows.size, setting.tile[0], halves) * parts,
        (
            *(z, *row_numbers, columns.z, *column_numbers, further.z, *options, *bounds),
            *(pull, partial, rows.size, columns.size, further.size, own),
        ),
        {"FEATURES": at_a_time, "POSITIVES": positives, **constants},
        setting,
    )
    return pull, partial


def sum_of(partial: Tensor, unit: Tensor | None, total: Tensor) -> None:
    """In a fixed order."""
    exact = partial.sum(dtype=torch.float64)
    total.copy_(exact if unit is None else exact * unit)


def finish(
    pull: Tensor,
    packed: Packed,
    given: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    normalize: bool,
    gradients: tuple[Tensor | None, ...],
) -> None:
    """The gradients of what was given."""
    first = 0
    for tensor, gradient in zip(given, gradients, strict=True):
        if tensor is None or gradient is None:
            continue
        constants, setting = packing(tensor)
        launch(
            finish_kernel,
            triton.cdiv(len(tensor), setting.tile[0]),
            (
                *(pull, tensor, packed.norms, *options, gradient),
                *(tensor.stride(0), len(tensor), first),
            ),
            {"NORMALIZE": normalize, **constants},
            setting,
        )
        first += len(tensor)
