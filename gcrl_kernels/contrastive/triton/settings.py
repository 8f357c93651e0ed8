"""In what tiles the Triton kernels of the contrastive losses compute, and by how many warps."""

from __future__ import annotations

from gcrl_kernels.triton_common import GENERATIONS, Setting, padded

MOST_FEATURES = {"half": 256, "single": 128}  # of a gradient that a program holds
SPARE = 128  # zero rows after packed ones: the most rows or columns of a tile
# In float16, of the weight of a pair that is a part of two losses; then 2^-28 is a normal number.
MOST_WEIGHT = 2.0**14
PACKING = 4096  # numbers of a program that packs or finishes embeddings

# Rows, columns and features of a similarity at a time. In single precision the tiles of both passes
# are the same, so that their scores are: at a temperature of 0.01 another order of summation would
# be the largest error of the gradients.
# pass, numbers, features (padded): sm_80, sm_90, sm_100
TILES: dict[tuple[str, str, int], tuple[Setting, ...]] = {
    ("forward", "half", 16): (Setting((128, 64, 16), 8, 2),) * 3,
    ("forward", "half", 32): (Setting((128, 64, 32), 8, 2),) * 3,
    ("forward", "half", 64): (Setting((128, 64, 64), 8, 2),) * 3,
    ("forward", "half", 128): (Setting((128, 64, 128), 8, 2),) * 3,
    ("forward", "half", 256): (Setting((128, 64, 64), 8, 2),) * 3,
    ("backward", "half", 16): (Setting((64, 64, 16), 4, 2),) * 3,
    ("backward", "half", 32): (Setting((64, 64, 32), 4, 2),) * 3,
    ("backward", "half", 64): (Setting((64, 64, 64), 4, 2),) * 3,
    ("backward", "half", 128): (Setting((64, 64, 128), 8, 2),) * 3,
    ("backward", "half", 256): (Setting((64, 64, 64), 8, 2),) * 3,
    ("forward", "single", 16): (Setting((32, 32, 16), 4, 2),) * 3,
    ("forward", "single", 32): (Setting((32, 32, 32), 4, 2),) * 3,
    ("forward", "single", 64): (Setting((32, 32, 16), 4, 2),) * 3,
    ("forward", "single", 128): (Setting((32, 32, 32), 4, 2),) * 3,
    ("backward", "single", 16): (Setting((32, 32, 16), 4),) * 3,
    ("backward", "single", 32): (Setting((32, 32, 32), 4),) * 3,
    ("backward", "single", 64): (Setting((32, 32, 16), 8),) * 3,
    ("backward", "single", 128): (Setting((32, 32, 32), 8),) * 3,
}


def features_at_a_time(kind: str, features: int) -> int:
    return min(padded(features), MOST_FEATURES[kind])


def tile_setting(direction: str, kind: str, of_generation: int, features: int) -> Setting:
    by_generation = TILES[direction, kind, features_at_a_time(kind, features)]
    return by_generation[GENERATIONS.index(of_generation)]
