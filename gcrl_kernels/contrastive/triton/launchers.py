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
from gcrl_kernels.contrastive.triton.embeddings import pack_kernel
from gcrl_kernels.contrastive.triton.forward import forward_kernel
from gcrl_kernels.contrastive.triton.settings import (
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
        views, views, further, (classes, share, scale, scale_value), losses, *lse,
        0, excluded(candidates), halves,
    )  # fmt: skip


def contrast_block_lse(
    rows: Tensor,  # float32 [n, D]
    columns: Tensor,  # float32 [m, D]
    scale: Tensor | None,
    scale_value: float,
    candidates: int,
    diagonal: int,
    lse: Tensor,  # float32 [n], to be written
) -> None:
    if len(rows) == 0:
        return
    _forward(
        pack((rows,), False), pack((columns,), False), pack((None,), False),
        (None, None, scale, scale_value), None, lse, None,
        diagonal, excluded(candidates, diagonal), False,
    )  # fmt: skip


class Packed(NamedTuple):
    """Embeddings as the kernels take them (embeddings.py)."""

    z: Tensor | None  # None where there are none
    norms: Tensor | None
    count: int
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
    lse: Tensor,
    rest: Tensor | None,
    own: int,
    excluded: int,
    halves: bool,
) -> None:
    constants, setting = tile_constants("forward", rows, excluded, halves)
    launch(
        forward_kernel,
        tiles_of(rows.count, setting.tile[0], halves),
        (
            *(rows.z, columns.z, further.z, *options, losses, lse, rest),
            *(rows.count, columns.count, further.count, own),
        ),
        constants,
        setting,
    )
