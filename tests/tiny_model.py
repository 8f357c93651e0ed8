"""A small network with large random weights, and tokens for it."""

from __future__ import annotations

import torch
from torch import Tensor

from gcrl.config import ModelConfig
from gcrl.model import GCRL


def make_model(grid=(2, 3), colors=5, dtype=torch.float64, **sizes) -> GCRL:
    """A small network with weights large enough that no dependence hides under rounding."""
    sizes = {"width": 12, "heads": 3, "outer_layers": 2, "inner_layers": 1, **sizes}
    torch.manual_seed(0)
    model = GCRL(ModelConfig(grid=grid, colors=colors, projection_dim=7, mlp_ratio=2, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def draw_tokens(count, grid=(2, 3), colors=5, seed=1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(colors, (count, *grid), generator=generator)
