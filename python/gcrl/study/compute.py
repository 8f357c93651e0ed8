"""What a run costs: its matrix products, counted on paper, and its time."""

from __future__ import annotations

from pathlib import Path

from gcrl import metrics
from gcrl.config import ModelConfig


def training_flops(model: ModelConfig, encoded_views: int, *, generates: bool) -> int:
    """Floating-point operations of one image's step: forward once, backward twice as much.

    A multiplication and its addition are two. Attention is counted whole, masked or not; norms,
    embeddings, views and the projection head are left out.
    """
    height, columns = model.grid
    width, ratio = model.width, model.mlp_ratio
    linear = 2 * width**2 * (4 + 2 * ratio)  # qkv, merge and the MLP, a pixel
    along_rows, down_columns = (linear + 4 * length * width for length in (columns, height))
    encoder = (along_rows + down_columns) * model.outer_layers // 2
    decoder = along_rows * model.inner_layers + 2 * width * model.colors
    return 3 * height * columns * (encoded_views * encoder + generates * decoder)


def training_seconds(folder: Path) -> float:
    """How long a run has trained, from its records: time for checkpoints and pauses left out."""
    seconds, before = 0.0, 0
    for record in metrics.read(folder / metrics.FILE, "images", "images_per_second"):
        seconds += (record["images"] - before) / record["images_per_second"]
        before = record["images"]
    return seconds
