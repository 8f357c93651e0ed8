"""What each kernel and a training step cost, from their formulas, and what a card makes of that.

Operations are those of matrix products, a multiplication and an addition counted as two; bytes are
what a kernel reads and writes that keeps all else on the chip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.floors import Work
from gcrl.config import ModelConfig
from gcrl.model import GCRL

BF16, FP32 = 2, 4  # bytes
# AdamW reads a weight, its gradient and two moments, and writes all but the gradient.
ADAM_BYTES = 7 * FP32


@dataclass(frozen=True)
class Card:
    """Peak rates of a GPU, as published."""

    name: str
    flops: float  # a second, products of bfloat16 matrices that are not sparse
    bytes: float  # a second, read or written
    exponentials: float  # a second
    float32: float  # operations a second outside matrix products
    link: float  # bytes a second, each way, to the other GPUs of a node
    port: float  # bytes a second, each way, a GPU's share of what leaves the node
    node: int  # GPUs

    def floor(self, work: Work) -> float:
        return max(work.bytes / self.bytes, work.flops / self.flops)

    def limit(self, work: Work) -> str:
        return "memory" if work.bytes / self.bytes > work.flops / self.flops else "products"


# 16 exponentials a clock on each of 132 multiprocessors at 1.83 GHz; 400 Gb/s leave a node per GPU.
H100 = Card("H100 SXM5", 989.4e12, 3.35e12, 16 * 132 * 1.83e9, 66.9e12, 450e9, 400e9 / 8, 8)


def attention(positions: int, keys: float, width: int, size: int = BF16) -> tuple[Work, Work]:
    """Forward and backward along rows where each of the positions meets `keys` keys.

    Forward reads q, k, v and writes the output, with two products; backward reads q, k, v and the
    output's gradient and writes three gradients, with five. `width` is heads x D.
    """
    tensor, product = positions * width * size, 2 * positions * keys * width
    return Work(4 * tensor, 2 * product), Work(7 * tensor, 5 * product)


def crossing(tensors: int, products: int, card: Card = H100, size: int = BF16) -> float:
    """The row length from which products take longer than moving that many tensors."""
    return tensors * size * card.flops / (2 * products * card.bytes)


def linear_cross_entropy(positions: int, width: int, colors: int, size: int = BF16) -> Work:
    """Forward and backward: logits and both gradients are a product each; inputs and gradients."""
    tensors = (positions + colors) * width * size
    return Work(2 * tensors, 3 * 2 * positions * width * colors)


def nearest_color(pixels: int, colors: int) -> tuple[int, int]:
    """Bytes (uint8 pixels read, int64 tokens written) and operations, 6 for a distance."""
    return pixels * (3 + 8), 6 * pixels * colors


def nt_xent_units(ranks: int = 1) -> tuple[int, int]:
    """Forward and backward in n²D operations: the triangle is half a product, a product is two.

    Backward makes the similarities anew and multiplies by them. Over ranks there is no triangle.
    """
    return (1 if ranks == 1 else 2), 4


def nt_xent(views: int, width: int, ranks: int = 1) -> float:
    """Operations of each rank's products, forward and backward, for the views of all ranks."""
    return sum(nt_xent_units(ranks)) * views**2 * width / ranks


def exponentials(views: int, ranks: int = 1) -> float:
    """Of each rank: one for each pair that a pass meets."""
    return (0.5 if ranks == 1 else 1.0) * views**2 / ranks + views**2 / ranks


@dataclass(frozen=True)
class Gather:
    """What NT-Xent sends a rank and has it hold, in bytes; embeddings and the rest are float32."""

    received: float
    held: float
    seconds: float  # at the links' peak rates, with no latency


def all_gather(ranks: int, views: int, width: int, card: Card = H100) -> Gather:
    """Each rank gets every other's embeddings and log-sum-exps, once, and keeps them.

    Across nodes all ports of a node are in use, and what has come in is passed on inside.
    """
    block = views * (width + 1) * FP32
    rate = card.link if ranks <= card.node else min(card.link, card.node * card.port)
    received = (ranks - 1) * block
    return Gather(received, ranks * block, received / rate)


def ring(ranks: int, views: int, width: int, card: Card = H100) -> Gather:
    """Blocks go round twice: forward embeddings; backward their lse and gradients too.

    Between two nodes there is one pair of neighbours, and thus one port.
    """
    row = FP32 * (width + (width + 2))
    rate = card.link if ranks <= card.node else min(card.link, card.port)
    received = (ranks - 1) * views * row
    held = 2 * views * (width + 2) * FP32 if ranks > 1 else views * (width + 2) * FP32
    return Gather(received, held, received / rate)


def all_reduce(ranks: int, count: int) -> float:
    """Bytes that each rank receives when float32 gradients are averaged in a ring."""
    return 2 * (ranks - 1) / ranks * count * FP32


@cache
def parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GCRL(model).parameters())


LINEAR, ATTENTION, COLORS, CONTRAST = (
    "linear layers", "attention", "colour cross-entropy", "NT-Xent",
)  # fmt: skip


def step_work(model: ModelConfig, batch: int, ranks: int = 1) -> dict[str, Work]:
    """Each part of a step, forward and backward, both losses; `batch` images on each rank.

    The encoder sees two views of an image, the decoder one. The bytes are those of attention and
    of the colour cross-entropy; those of the linear layers are left out.
    """
    height, columns = model.grid
    pixels = batch * height * columns
    weights = (4 + 2 * model.mlp_ratio) * model.width**2  # of a block
    head = model.width * (model.width + model.projection_dim)
    seen = 2 * pixels * model.outer_layers + pixels * model.inner_layers
    blocks = model.outer_layers // 2 * [(2 * pixels, columns), (2 * pixels, (height + 1) / 2)]
    blocks += model.inner_layers * [(pixels, (columns + 1) / 2)]
    passes = [work for block in blocks for work in attention(*block, model.width)]
    views = 2 * batch
    return {
        LINEAR: Work(0, 3 * 2 * (seen * weights + views * head)),
        ATTENTION: Work(sum(w.bytes for w in passes), sum(w.flops for w in passes)),
        COLORS: linear_cross_entropy(pixels, model.width, model.colors),
        CONTRAST: Work(
            6 * views * model.projection_dim * FP32,
            nt_xent(ranks * views, model.projection_dim, ranks),
        ),
    }


def step_flops(model: ModelConfig, batch: int, ranks: int = 1) -> dict[str, float]:
    return {part: work.flops for part, work in step_work(model, batch, ranks).items()}


def step_floor(model: ModelConfig, batch: int, ranks: int = 1, card: Card = H100) -> float:
    """Seconds of a step at peak rates, part after part, layer norms and the like left out."""
    times = [card.floor(work) for work in step_work(model, batch, ranks).values()]
    pairs = exponentials(2 * batch * ranks, ranks) / card.exponentials
    times[-1] = max(times[-1], pairs)  # NT-Xent's exponentials beside its products
    return sum(times) + ADAM_BYTES * parameters(model) / card.bytes
