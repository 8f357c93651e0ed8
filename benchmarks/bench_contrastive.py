"""NT-Xent of 2N views and its kin, beside plain and compiled PyTorch and other people's losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.contest import PASSES, Case, Function
from benchmarks.floors import Work
from benchmarks.measure import DEVICE
from benchmarks.peers.contrastive import (
    CONTENDERS,
    DCL,
    INFO_NCE,
    SUPCON,
    plain_dcl,
    plain_info_nce,
    plain_supcon,
)

BLOCK = 1024  # rows of the exact computation at a time


@dataclass(frozen=True)
class NTXent(Case):
    """Two views of `images` images, their embeddings [images, width] not normalised."""

    images: int
    width: int
    dtype: torch.dtype
    temperature: float = 0.1

    def __str__(self) -> str:
        return f"2N {2 * self.images}, D {self.width}, {str(self.dtype)[6:]}"

    def describe(self) -> dict[str, Any]:
        return {"2N": 2 * self.images, "D": self.width, "dtype": str(self.dtype)[6:]}

    def inputs(self) -> Sequence[Tensor]:
        """z0 and z1: a view's embedding is half its image's."""
        generator = torch.Generator().manual_seed(0)
        image, *views = torch.randn(3, self.images, self.width, generator=generator)
        return [(image + view).to(DEVICE, self.dtype).requires_grad_() for view in views]

    def upstream(self) -> Tensor:
        return torch.ones((), device=DEVICE)

    def exact(self, way: str) -> Sequence[Tensor]:
        return self._exact(way, masked=True)

    def unmasked(self, way: str) -> Sequence[Tensor]:
        """The same with each view among its own negatives."""
        return self._exact(way, masked=False)

    def _exact(self, way: str, *, masked: bool) -> Sequence[Tensor]:
        """Row block by row block, so that it fits: dz needs every row's log-sum-exp."""
        v = torch.cat([view.detach().double() for view in self.inputs()]).requires_grad_()
        z = normalize(v, dim=1)
        fixed, anchors = z.detach(), len(z)
        partners = fixed.roll(self.images, 0)
        lse = torch.cat(
            [self._scores(fixed, start, masked).logsumexp(1) for start in range(0, anchors, BLOCK)]
        )
        positive = (fixed * partners).sum(1) / self.temperature
        loss = (lse - positive).mean()
        if way == PASSES[0]:
            return [loss]
        dz = -2 * partners
        for start in range(0, anchors, BLOCK):
            scores = self._scores(fixed, start, masked)
            weight = (scores - lse[start : start + BLOCK, None]).exp() + (scores - lse).exp()
            dz[start : start + BLOCK] += weight @ fixed
        (dv,) = torch.autograd.grad(z, v, dz / (anchors * self.temperature))
        return [loss, *dv.chunk(2)]

    def _scores(self, z: Tensor, start: int, masked: bool) -> Tensor:
        scores = z[start : start + BLOCK] @ z.T / self.temperature
        if masked:
            scores.diagonal(start).fill_(-torch.inf)
        return scores

    def work(self, way: str) -> Work:
        """The similarities' upper triangle in either pass; backward, a product of the square."""
        anchors = 2 * self.images
        size = anchors * self.width * self.dtype.itemsize
        square = 2 * anchors**2 * self.width  # one n x n x D product
        if way == PASSES[0]:
            return Work(size, square / 2)
        return Work(3 * size, square * 2)


class Kin(NTXent):
    """Another loss of the same views."""

    plain: Callable[[Any], Function]

    def _exact(self, way: str, *, masked: bool) -> Sequence[Tensor]:
        leaves = [tensor.detach().double().requires_grad_() for tensor in self.inputs()]
        loss = self.plain(self)(*leaves)
        gradients = [] if way == PASSES[0] else torch.autograd.grad(loss, leaves)
        return [loss.detach(), *gradients]


class Decoupled(Kin):
    plain = staticmethod(plain_dcl)


class Supervised(Kin):
    """Of one tensor of 2N embeddings, ten of each label."""

    plain = staticmethod(plain_supcon)

    def inputs(self) -> Sequence[Tensor]:
        return [torch.cat([view.detach() for view in super().inputs()]).requires_grad_()]

    def labels(self) -> Tensor:
        return torch.arange(2 * self.images, device=DEVICE) % (self.images // 5)


class TwoTowers(Kin):
    """Of the similarities across the towers alone."""

    plain = staticmethod(plain_info_nce)

    def work(self, way: str) -> Work:
        whole = super().work(way)
        return Work(whole.bytes, whole.flops / 2)


CPU = [
    NTXent(128, 128, torch.float32),
    NTXent(256, 128, torch.float32),
    NTXent(1024, 128, torch.float32),
    NTXent(4096, 128, torch.float32),
    NTXent(1024, 2048, torch.float32),
    NTXent(1024, 128, torch.bfloat16),
]
GPU = [
    *(NTXent(images, 128, torch.bfloat16) for images in (256, 2048, 16_384, 65_536)),
    *(NTXent(2048, width, torch.bfloat16) for width in (512, 2048)),
    NTXent(16_384, 128, torch.float16),
    NTXent(2048, 128, torch.float32),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("case", CPU if DEVICE == "cpu" else GPU, ids=str)
def test_nt_xent(report, case, way, contender) -> None:
    report(case, way, contender)


KIN = [(1024, 128, torch.float32)] if DEVICE == "cpu" else [(2048, 128, torch.bfloat16)]


@pytest.mark.parametrize("contender", DCL, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("case", [Decoupled(*case) for case in KIN], ids=str)
def test_dcl(report, case, way, contender) -> None:
    report(case, way, contender)


@pytest.mark.parametrize("contender", SUPCON, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("case", [Supervised(*case) for case in KIN], ids=str)
def test_supcon(report, case, way, contender) -> None:
    report(case, way, contender)


@pytest.mark.parametrize("contender", INFO_NCE, ids=lambda contender: contender.name)
@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("case", [TwoTowers(*case) for case in KIN], ids=str)
def test_info_nce(report, case, way, contender) -> None:
    report(case, way, contender)
