"""Which Triton kernel computes which rows, in what tiles and by how many warps.

By what compiles without spills, and into the shared memory that a program may have, for sm_80,
sm_90 and sm_100, with and without a bias, a mask and causality, for rows that fill their tiles and
rows that do not, by Triton 3.6.0 and 3.7.1. (One exception: by 3.6.0, on sm_90, the backward of 32
positions in halves with D 32, a bias and a mask has 8 bytes of stack.) "sm_80" stands for all
others; the 99 KB of sm_86, sm_89 and sm_120 are enough for it.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from gcrl_kernels.triton_common import GENERATIONS, Setting, padded

BLOCKS = (16, 32, 64, 128)  # lengths of rows that are held whole, padded

# Warps of the row kernels for each of BLOCKS; 0: the tile kernels.
# pass, numbers, features (padded): sm_80, sm_90, sm_100
ROWS: dict[tuple[str, str, int], tuple[tuple[int, int, int, int], ...]] = {
    ("forward", "half", 16): ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
    ("forward", "half", 32): ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
    ("forward", "half", 64): ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
    ("forward", "half", 128): ((1, 2, 8, 0), (1, 2, 4, 8), (1, 2, 4, 8)),
    ("backward", "half", 16): ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
    ("backward", "half", 32): ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
    ("backward", "half", 64): ((1, 2, 4, 0), (1, 2, 4, 8), (1, 2, 4, 8)),
    ("backward", "half", 128): ((1, 2, 0, 0), (1, 2, 4, 0), (1, 2, 4, 0)),
    ("backward with dbias", "half", 16): ((1, 2, 4, 0), (1, 2, 4, 0), (1, 4, 4, 0)),
    ("backward with dbias", "half", 32): ((1, 2, 4, 0), (1, 2, 4, 0), (1, 2, 4, 0)),
    ("backward with dbias", "half", 64): ((1, 2, 0, 0), (1, 4, 4, 0), (1, 2, 4, 0)),
    ("backward with dbias", "half", 128): ((1, 2, 0, 0), (1, 4, 8, 0), (1, 4, 8, 0)),
    ("forward", "single", 16): ((1, 2, 4, 0), (1, 2, 4, 0), (1, 2, 4, 0)),
    ("forward", "single", 32): ((1, 2, 8, 0), (1, 2, 8, 0), (1, 2, 16, 0)),
    ("forward", "single", 64): ((1, 4, 8, 0), (1, 4, 8, 0), (1, 4, 0, 0)),
    ("forward", "single", 128): ((2, 16, 0, 0), (2, 8, 0, 0), (2, 8, 0, 0)),
    ("backward", "single", 16): ((1, 2, 4, 0), (1, 2, 4, 0), (1, 2, 8, 0)),
    ("backward", "single", 32): ((1, 2, 0, 0), (1, 2, 0, 0), (1, 4, 0, 0)),
    ("backward", "single", 64): ((2, 4, 0, 0), (2, 4, 0, 0), (2, 8, 0, 0)),
    ("backward", "single", 128): ((4, 0, 0, 0), (4, 0, 0, 0), (4, 0, 0, 0)),
    ("backward with dbias", "single", 16): ((1, 2, 16, 0), (1, 2, 16, 0), (1, 4, 4, 0)),
    ("backward with dbias", "single", 32): ((1, 8, 0, 0), (1, 4, 0, 0), (1, 4, 0, 0)),
    ("backward with dbias", "single", 64): ((2, 4, 0, 0), (2, 4, 0, 0), (2, 0, 0, 0)),
    ("backward with dbias", "single", 128): ((4, 0, 0, 0), (4, 0, 0, 0), (2, 0, 0, 0)),
}

# Tiles of the others.
TILES: dict[tuple[str, str, int], tuple[Setting, ...]] = {
    ("forward", "half", 16): (Setting((128, 64), 8, 2),) * 3,
    ("forward", "half", 32): (Setting((128, 64), 8, 2),) * 3,
    ("forward", "half", 64): (Setting((64, 64), 4, 2),) + (Setting((128, 64), 8, 2),) * 2,
    ("forward", "half", 128): (
        Setting((64, 32), 8, 2),
        Setting((64, 64), 8, 2),
        Setting((128, 64), 8, 2),
    ),
    ("backward", "half", 16): (Setting((64, 64), 4, 2),) * 3,
    ("backward", "half", 32): (Setting((64, 64), 8, 1),) + (Setting((64, 64), 4, 2),) * 2,
    ("backward", "half", 64): (Setting((32, 32), 4),) + (Setting((64, 64), 4),) * 2,
    ("backward", "half", 128): (Setting((64, 32), 8), Setting((32, 32), 4), Setting((64, 64), 8)),
    ("dbias", "half", 16): (Setting((64,), 4),) * 3,
    ("dbias", "half", 32): (Setting((64,), 4),) * 3,
    ("dbias", "half", 64): (Setting((32,), 4),) + (Setting((64,), 4),) * 2,
    ("dbias", "half", 128): (Setting((32,), 4), Setting((64,), 4), Setting((32,), 4)),
    ("forward", "single", 16): (Setting((32, 32), 4),) * 3,
    ("forward", "single", 32): (Setting((32, 32), 4),) * 2 + (Setting((64, 32), 8, 2),),
    ("forward", "single", 64): (Setting((32, 32), 8),) * 2 + (Setting((64, 32), 8, 2),),
    ("forward", "single", 128): (Setting((64, 32), 16),) * 3,
    ("backward", "single", 16): (Setting((32, 32), 4),) * 3,
    ("backward", "single", 32): (Setting((32, 32), 4),) * 3,
    ("backward", "single", 64): (Setting((32, 32), 8),) * 3,
    ("backward", "single", 128): (Setting((16, 16), 8),) * 3,
    ("dbias", "single", 16): (Setting((32,), 4),) * 3,
    ("dbias", "single", 32): (Setting((32,), 4), Setting((32,), 8), Setting((32,), 8)),
    ("dbias", "single", 64): (Setting((16,), 4), Setting((32,), 4), Setting((32,), 8)),
    ("dbias", "single", 128): (Setting((32,), 4), Setting((32,), 16), Setting((32,), 16)),
}


def row_setting(
    direction: str, kind: str, of_generation: int, features: int, length: int, crowded: bool
) -> Setting | None:
    """Of the kernel that holds a row whole; None where it would not fit.

    `crowded`: with a bias and a mask, which the longest rows have no registers for.
    """
    block = padded(length)
    if block not in BLOCKS or (crowded and block == BLOCKS[-1]):
        return None
    by_generation = ROWS[direction, kind, padded(features)]
    warps = by_generation[GENERATIONS.index(of_generation)][BLOCKS.index(block)]
    return Setting((block,), warps) if warps else None


def tile_setting(direction: str, kind: str, of_generation: int, features: int) -> Setting:
    """Of the kernel for longer rows; "dbias": of the bias's gradient."""
    return TILES[direction, kind, padded(features)][GENERATIONS.index(of_generation)]


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
