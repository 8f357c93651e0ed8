"""Axial attention over images, beside SDPA and FlexAttention on free views and plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contest import PASSES, Case
from benchmarks.floors import Work
from benchmarks.measure import DEVICE
from benchmarks.peers.axial_attention import CONTENDERS
from gcrl_kernels.axial_attention import reference


@dataclass(frozen=True)
class Axial(Case):
    """Attention along the rows (axis 1) or down the columns (axis 0) of `batch` images."""

    batch: int
    grid: tuple[int, int]  # height, width
    heads: int
    features: int  # D, of each head
    axis: int
    causal: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        height, width = self.grid
        kind = ("columns", "rows")[self.axis] + (", causal" if self.causal else "")
        sizes = f"B {self.batch}, {height}x{width}, {self.heads} heads, D {self.features}"
        return f"{sizes}, {kind}, {str(self.dtype)[6:]}"

    @property
    def length(self) -> int:
        """Of the rows that are attended along."""
        return self.grid[self.axis]

    def describe(self) -> dict[str, Any]:
        height, width = self.grid
        return {
            **asdict(self),
            "grid": f"{height}x{width}",
            "axis": ("columns", "rows")[self.axis],
            "dtype": str(self.dtype)[6:],
        }

    def inputs(self) -> Sequence[Tensor]:
        """q, k and v, contiguous [B, H, W, heads, D]."""
        generator = torch.Generator().manual_seed(0)
        shape = (3, self.batch, *self.grid, self.heads, self.features)
        tensors = torch.randn(shape, generator=generator)
        return [tensor.to(DEVICE, self.dtype).requires_grad_() for tensor in tensors]

    def upstream(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, *self.grid, self.heads, self.features)
        return torch.randn(shape, generator=generator).to(DEVICE, self.dtype)

    def exact(self, way: str) -> Sequence[Tensor]:
        """One image after another, so that the scores fit."""
        q, k, v = (tensor.detach().double() for tensor in self.inputs())
        options = (None, None, self.axis, self.causal, self.features**-0.5)
        results = []
        for image in range(self.batch):
            part = slice(image, image + 1)
            rows = q[part], k[part], v[part]
            out, lse = reference.forward(*rows, *options)
            gradients: Sequence[Tensor] = ()
            if way != PASSES[0]:
                upstream = self.upstream()[part].double()
                *gradients, _ = reference.backward(upstream, *rows, out, lse, *options, False)
            results.append((out, *gradients))
        return [torch.cat(parts) for parts in zip(*results, strict=True)]

    def work(self, way: str) -> Work:
        """Forward q, k, v, out once; backward their gradients and again q, k, v: 7 tensors."""
        height, width = self.grid
        positions = self.batch * height * width * self.heads
        size = positions * self.features * self.dtype.itemsize
        keys = (self.length + 1) / 2 if self.causal else self.length
        product = 2 * positions * keys * self.features
        if way == PASSES[0]:
            return Work(4 * size, 2 * product)
        return Work(11 * size, 7 * product)


ROWS, COLUMNS = 1, 0
WAYS_TO_LOOK = [(ROWS, False), (ROWS, True), (COLUMNS, False), (COLUMNS, True)]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

CPU = [
    *(Axial(8, (32, 32), 8, 64, axis, causal, FP32) for axis, causal in WAYS_TO_LOOK),
    Axial(128, (8, 8), 8, 64, ROWS, False, FP32),
    Axial(2, (64, 64), 8, 64, ROWS, False, FP32),
    Axial(1, (128, 128), 8, 64, COLUMNS, True, FP32),
    Axial(1, (32, 256), 8, 64, ROWS, False, FP32),
    Axial(8, (32, 32), 16, 32, COLUMNS, True, FP32),
    Axial(8, (32, 32), 4, 128, ROWS, False, FP32),
    Axial(8, (32, 32), 8, 64, COLUMNS, True, BF16),
]
GPU = [
    *(Axial(128, (32, 32), 8, 64, axis, causal, BF16) for axis, causal in WAYS_TO_LOOK),
    *(Axial(128, (64, 64), 8, 64, axis, causal, BF16) for axis, causal in WAYS_TO_LOOK),
    *(Axial(1024, (8, 8), 8, 64, axis, False, BF16) for axis in (ROWS, COLUMNS)),
    *(Axial(16, (128, 128), 8, 64, axis, True, BF16) for axis in (ROWS, COLUMNS)),
    *(Axial(16, (64, 256), 8, 64, ROWS, causal, BF16) for causal in (False, True)),
    *(Axial(128, (32, 32), 16, 32, axis, True, BF16) for axis in (ROWS, COLUMNS)),
    *(Axial(64, (32, 32), 8, 128, axis, True, BF16) for axis in (ROWS, COLUMNS)),
    Axial(128, (32, 32), 8, 64, ROWS, False, FP16),
    Axial(128, (32, 32), 8, 64, COLUMNS, True, FP32),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("case", CPU if DEVICE == "cpu" else GPU, ids=str)
def test_axial_attention(report, case, way, contender) -> None:
    report(case, way, contender)
