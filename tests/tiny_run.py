"""A run small enough for tests: 4x4 pixels, 8 colours, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gcrl import checkpoint
from gcrl.config import Config, EvaluationConfig, ModelConfig, OptimConfig, ViewsConfig
from gcrl.data import Dataset, ImageSet
from gcrl.manifest import manifest
from gcrl.palette import save_palette
from gcrl.run import Run, build_model, load

CONFIG = Config(
    model=ModelConfig(
        grid=(4, 4), colors=8, width=16, heads=2, outer_layers=2, inner_layers=1, projection_dim=8
    ),
    views=ViewsConfig(weak_shift=1),
    optim=OptimConfig(batch_size=4),
    evaluation=EvaluationConfig(probe_train=40, probe_test=20, neighbors=3, sample_count=6),
)
PALETTE = torch.tensor(  # the corners of the colour cube, a little inside it
    [[r, g, b] for r in (10, 240) for g in (20, 230) for b in (30, 220)], dtype=torch.float32
)


def save(folder: Path, config: Config = CONFIG, *, spread: float = 0.5) -> Path:
    """Leave a run in the folder, with weights random enough that no output is nearly uniform."""
    (folder / "config.json").write_text(config.to_json())
    save_palette(folder / "palette.npy", PALETTE)
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters())
    ema = {name: 0.9 * parameter.detach() for name, parameter in model.named_parameters()}
    state = manifest(config, PALETTE)
    checkpoint.save(folder, 30, model, optimizer, ema=ema, state=state)
    return folder


def tiny_run(folder: Path, config: Config = CONFIG) -> Run:
    return load(save(folder, config), device="cpu")


def with_settings(group: str, **settings: object) -> Config:
    """CONFIG with other settings in one of its groups."""
    return replace(CONFIG, **{group: replace(getattr(CONFIG, group), **settings)})


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def noise_images(count: int, seed: int = 0, side: int = 4) -> np.ndarray:
    return random_images(count, side, side, 3, seed=seed)


def color_classes(count: int = 60, *, labelled: bool = True) -> Dataset:
    """Three classes, each of its own colour with noise: easily told apart from raw pixels."""

    def split(seed: int) -> ImageSet:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % 3
        images = rng.integers(0, 60, (count, 4, 4, 3))
        images[np.arange(count), :, :, labels] += 180
        return ImageSet(images.astype(np.uint8), labels if labelled else None)

    return Dataset("colour classes", split(1), split(2), ("red", "green", "blue"))
