"""The nearest palette colour, and cross-entropy with it as target, beside other people's.

Peers of the cross-entropy get ready tokens; ours find them, and that is in their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.contest import PASSES, Case
from benchmarks.floors import Work
from benchmarks.measure import DEVICE
from benchmarks.peers import color_cross_entropy as peers
from gcrl_kernels import quantize_colors

BLOCK = 16_384  # positions of the exact computation at a time


@dataclass(frozen=True)
class CrossEntropy(Case):
    """The mean loss of hidden [positions, width] against a palette; `linear` says which form.

    The linear form has the last layer in it; the other one starts from the logits.
    """

    positions: int
    width: int
    colors: int
    dtype: torch.dtype
    linear: bool

    def __str__(self) -> str:
        width = f", C {self.width}" if self.linear else ""
        return f"M {self.positions}{width}, K {self.colors}, {str(self.dtype)[6:]}"

    def describe(self) -> dict[str, Any]:
        width = {"C": self.width} if self.linear else {}
        return {"M": self.positions, **width, "K": self.colors, "dtype": str(self.dtype)[6:]}

    def inputs(self) -> Sequence[Tensor]:
        """hidden and weight; or the logits."""
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=DEVICE, dtype=self.dtype)
            return values.requires_grad_()

        if not self.linear:
            return [normal(self.positions, self.colors)]
        weight = normal(self.colors, self.width).detach() * self.width**-0.5
        return [normal(self.positions, self.width), weight.requires_grad_()]

    def pixels(self) -> tuple[Tensor, Tensor]:
        """Pixels uint8 [M, 3] and a palette float32 [K, 3] in the same units."""
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(0, 256, (self.positions, 3), dtype=torch.uint8, generator=generator)
        palette = torch.rand(self.colors, 3, generator=generator) * 255
        return pixels.to(DEVICE), palette.to(DEVICE)

    def tokens(self) -> Tensor:
        return quantize_colors(*self.pixels())

    def upstream(self) -> Tensor:
        return torch.ones((), device=DEVICE)

    def exact(self, way: str) -> Sequence[Tensor]:
        """Block by block, so that the logits fit."""
        hidden, *weight = (tensor.detach().double() for tensor in self.inputs())
        loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *weight)]
        for part, tokens in zip(
            torch.arange(self.positions, device=DEVICE).split(BLOCK),
            self.tokens().split(BLOCK),
            strict=True,
        ):
            leaves = [tensor.detach().requires_grad_() for tensor in (hidden[part], *weight)]
            logits = leaves[0] @ leaves[1].T if self.linear else leaves[0]
            block = cross_entropy(logits, tokens, reduction="sum") / self.positions
            loss += block.detach()
            if way != PASSES[0]:
                first, *rest = torch.autograd.grad(block, leaves)
                gradients[0][part] = first
                for total, gradient in zip(gradients[1:], rest, strict=True):
                    total += gradient
        return [loss] if way == PASSES[0] else [loss, *gradients]

    def work(self, way: str) -> Work:
        """The linear form: one product forward, three in all; inputs and gradients once."""
        size = self.dtype.itemsize
        if not self.linear:
            logits = self.positions * self.colors * size
            return Work(logits, 0) if way == PASSES[0] else Work(2 * logits, 0)
        tensors = (self.positions + self.colors) * self.width * size
        product = 2 * self.positions * self.width * self.colors
        if way == PASSES[0]:
            return Work(tensors, product)
        return Work(2 * tensors, 3 * product)


@dataclass(frozen=True)
class Quantize(Case):
    """The nearest of `colors` palette colours of each of `pixels` pixels, [pixels, 3]."""

    pixels: int
    colors: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.pixels} pixels, K {self.colors}, {str(self.dtype)[6:]}"

    @property
    def precision(self) -> torch.dtype:
        return torch.float32

    def describe(self) -> dict[str, Any]:
        return {"pixels": self.pixels, "K": self.colors, "dtype": str(self.dtype)[6:]}

    def inputs(self) -> Sequence[Tensor]:
        """Pixels and a palette, both in 0..255 and both integers or both floats."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(self.pixels, 3, generator=generator) * 255
        palette = torch.rand(self.colors, 3, generator=generator) * 255
        if not self.dtype.is_floating_point:
            palette = palette.to(torch.int32)
        return [pixels.to(DEVICE, self.dtype), palette.to(DEVICE)]

    def upstream(self) -> Tensor:
        return torch.empty(())  # there is no backward

    def exact(self, way: str) -> Sequence[Tensor]:
        pixels, palette = (tensor.double() for tensor in self.inputs())
        parts = (torch.cdist(part, palette).amin(1) for part in pixels.split(BLOCK))
        return [torch.cat(list(parts))]

    def comparable(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The distances to the chosen colours: of equally near ones any is right."""
        pixels, palette = (tensor.double() for tensor in self.inputs())
        return [(pixels - palette[outputs[0].long()]).norm(dim=1)]

    def work(self, way: str) -> Work:
        """Pixels read and indices written; a distance is 5 operations less one (|x|² is common)."""
        bytes_moved = self.pixels * (3 * self.dtype.itemsize + 8)
        return Work(bytes_moved, 6 * self.pixels * self.colors)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
QUANTIZE = {
    "cpu": [Quantize(131_072, 512, FP32), Quantize(131_072, 512, torch.uint8)],
    "cuda": [
        Quantize(1_048_576, 512, FP32),
        Quantize(131_072, 512, torch.uint8),
        Quantize(1_048_576, 512, torch.uint8),
    ],
}[DEVICE]
LOGITS = {
    "cpu": [CrossEntropy(16_384, 0, 512, FP32, False), CrossEntropy(16_384, 0, 512, BF16, False)],
    "cuda": [
        *(CrossEntropy(m, 0, 512, BF16, False) for m in (32_768, 131_072, 1_048_576)),
        CrossEntropy(131_072, 0, 512, FP32, False),
    ],
}[DEVICE]
LINEAR = {
    "cpu": [
        CrossEntropy(4_096, 512, 512, FP32, True),
        CrossEntropy(16_384, 512, 512, FP32, True),
        CrossEntropy(65_536, 96, 512, FP32, True),
        CrossEntropy(8_192, 1024, 512, FP32, True),
        CrossEntropy(16_384, 512, 512, BF16, True),
    ],
    "cuda": [
        *(CrossEntropy(m, 512, 512, BF16, True) for m in (32_768, 131_072, 1_048_576)),
        CrossEntropy(131_072, 1024, 512, BF16, True),
        CrossEntropy(131_072, 512, 512, FP16, True),
        CrossEntropy(131_072, 512, 512, FP32, True),
    ],
}[DEVICE]


@pytest.mark.parametrize("contender", peers.QUANTIZE, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", PASSES[:1])
@pytest.mark.parametrize("case", QUANTIZE, ids=str)
def test_quantize_colors(report, case, way, contender) -> None:
    report(case, way, contender)


@pytest.mark.parametrize("contender", peers.LOGITS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("case", LOGITS, ids=str)
def test_color_cross_entropy(report, case, way, contender) -> None:
    report(case, way, contender)


@pytest.mark.parametrize("contender", peers.LINEAR, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_color_cross_entropy(report, case, way, contender) -> None:
    report(case, way, contender)
