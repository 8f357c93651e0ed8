"""One step of training: our model, beside the same model on SDPA, F.linear_cross_entropy, lightly.

A step begins with the views as palette tokens and ends with the optimiser: forward in the trainer's
precision, backward, clipping, AdamW. Its floor knows the matrix products and what AdamW reads and
writes, nothing of what lies between. The results also have the images a second and where the time
goes; a result's peak memory is beyond the weights and the optimiser's state, `held_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Case
from benchmarks.costs import ADAM_BYTES, parameters, step_flops
from benchmarks.floors import Work
from benchmarks.measure import DEVICE
from benchmarks.peers.train_step import CONTENDERS
from gcrl.config import Config
from gcrl.presets import preset
from gcrl.run import build_model
from gcrl.trainer import multiplies_bfloat16
from gcrl_kernels import nt_xent

FP32, BF16 = torch.float32, torch.bfloat16
WAYS = ("step",)
BLOCK = 4096  # pixels of the exact computation at a time


@dataclass(frozen=True)
class TrainStep(Case):
    """A step of a preset's model on a batch; bfloat16 is autocast, the weights are float32."""

    preset: str
    batch: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.preset}, batch {self.batch}, {str(self.dtype)[6:]}"

    @property
    def device(self) -> str:
        return DEVICE

    @cached_property
    def config(self) -> Config:
        return preset(self.preset)

    def describe(self) -> dict[str, Any]:
        return {"preset": self.preset, "batch": self.batch, "dtype": str(self.dtype)[6:]}

    def inputs(self) -> Sequence[Tensor]:
        return []  # contenders make their own, the model's weights among them

    def upstream(self) -> Tensor:
        return torch.ones((), device=self.device)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Weak and strong views, [B, H, W]: colours near one that an image has for its own."""
        generator = torch.Generator().manual_seed(0)
        colors, shape = self.config.model.colors, (self.batch, *self.config.model.grid)
        own = torch.randint(colors, (self.batch, 1, 1), generator=generator)
        near = (torch.randint(max(2, colors // 8), (2, *shape), generator=generator) + own) % colors
        weak, strong = near.to(self.device)
        return weak, strong

    def allowed(self, plain: float | None) -> float:
        """Roundings add up over pixels, of which compilers sum in any order, and over layers."""
        if plain is None:
            return 2**-14 if self.dtype == FP32 else 2**-4
        return max(2**-14 if self.dtype == FP32 else 2**-9, 2 * plain)

    def part(self, index: int) -> str:
        if index < 2:
            return ("the generative loss", "the contrastive loss")[index]
        names = [name for name, _ in build_model(self.config).named_parameters()]
        return f"the gradient of {names[index - 2]}"

    def exact(self, way: str) -> Sequence[Tensor]:
        """Both losses and each parameter's gradient, some images after others so that they fit.

        The gradient of z is found first, from every image's; then each block of images has a part
        in the gradient of the weights.
        """
        model, objective = build_model(self.config).double().to(self.device), self.config.objective
        model.backend = "reference"
        for block in (*model.outer, *model.inner):
            block.backend = "reference"
        views = self.tokens()
        pixels = views[0][0].numel()
        parts = torch.arange(self.batch, device=self.device).split(max(1, BLOCK // pixels))

        def project(part: Tensor) -> Tensor:
            return torch.stack([model.project(model.features(view[part])) for view in views])

        with torch.no_grad():
            z = torch.cat([project(part) for part in parts], 1).requires_grad_()  # [2, B, P]
        contrastive = nt_xent(*z, temperature=objective.temperature, backend="reference")
        (dz,) = torch.autograd.grad(objective.beta * contrastive, z)
        generative = torch.zeros_like(contrastive)
        for part in parts:
            share = len(part) / self.batch
            loss = model(views[0][part], None, replace(objective, beta=0.0)).generative * share
            generative = generative + loss.detach()
            (objective.alpha * loss + (project(part) * dz[:, part]).sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [generative, contrastive.detach(), *gradients]

    def work(self, way: str) -> Work:
        model = self.config.model
        return Work(ADAM_BYTES * parameters(model), sum(step_flops(model, self.batch).values()))


CPU = [
    TrainStep("cifar10-small", 64, FP32),
    *([TrainStep("cifar10-small", 64, BF16)] if multiplies_bfloat16(torch.device("cpu")) else []),
    TrainStep("cifar10", 2, FP32),
]
GPU = [TrainStep("cifar10", preset("cifar10").optim.batch_size, BF16)]


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CPU if DEVICE == "cpu" else GPU, ids=str)
def test_train_step(report, case, way, contender) -> None:
    report(case, way, contender)
