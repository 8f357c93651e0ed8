"""Contenders of NT-Xent: functions of two views [N, D], not normalised, to the mean loss."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.contest import PLAIN, Contender, Function, Unavailable
from benchmarks.peers import compiled, load, needs_gpu, ours
from gcrl_kernels import dcl, info_nce, nt_xent, supcon

PAIRS_OF_PAIRS = 256  # views that pytorch-metric-learning's pair-based loss has memory for


def partners(views: int, device: torch.device) -> Tensor:
    """Of each of the 2N views the other one of its image, int64 [2N]."""
    return torch.arange(views, device=device).roll(views // 2)


def _ours(case, backend: str) -> Function:
    return lambda z0, z1: nt_xent(z0, z1, temperature=case.temperature, backend=backend)


def _plain(case) -> Function:
    """As people write it: the 2N x 2N similarities, the diagonal struck out, cross-entropy."""

    def function(z0: Tensor, z1: Tensor) -> Tensor:
        z = normalize(torch.cat([z0, z1]).float(), dim=1)
        if z.is_cuda:
            z = z.to(z0.dtype)  # the products in the views' dtype, as a tensor core makes them
        scores = (z @ z.T).float() / case.temperature
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        return cross_entropy(scores.masked_fill(own, -torch.inf), partners(len(z), z.device))

    return function


@cache
def lightly_losses() -> Any:
    """lightly's module of losses; raises Unavailable where it is not installed.

    At import it asks torchvision for two names that NT-Xent does not use, and torchvision's
    binaries load beside the very build of PyTorch alone that they were made for: where they do
    not, the two names are all it gets.
    """
    load("lightly", "lightly")
    try:
        importlib.import_module("torchvision.ops")
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        ops = ModuleType("torchvision.ops")
        ops.roi_align = ops.StochasticDepth = None  # type: ignore[attr-defined]
        stubs = {"torchvision": ModuleType("torchvision"), "torchvision.ops": ops}
        sys.modules.update(stubs)
        try:
            return load("lightly.loss", "lightly")
        finally:
            for name in stubs:
                del sys.modules[name]
    return load("lightly.loss", "lightly")


def _lightly(case) -> Function:
    return lightly_losses().NTXentLoss(temperature=case.temperature)


def _metric_learning_labels(case) -> Function:
    """SupConLoss, whose positives are the other view alone: as a matrix, not pair by pair."""
    losses = load("pytorch_metric_learning.losses", "pytorch-metric-learning")
    loss = losses.SupConLoss(temperature=case.temperature)

    def function(z0: Tensor, z1: Tensor) -> Tensor:
        labels = torch.arange(len(z0), device=z0.device).repeat(2)
        return loss(torch.cat([z0, z1]), labels)

    return function


def _metric_learning_pairs(case) -> Function:
    if 2 * case.images > PAIRS_OF_PAIRS:
        raise Unavailable(
            f"it takes memory of the order of (2N)³: measured to 2N = {PAIRS_OF_PAIRS}"
        )
    losses = load("pytorch_metric_learning.losses", "pytorch-metric-learning")
    return losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=case.temperature))


def _inf_cl(case) -> Function:
    needs_gpu("Inf-CL")
    flash = load("inf_cl.flash", "inf-cl").cal_flash_loss
    head = min(case.width, 256)
    if case.width % head or 2 * case.images % 64:
        raise Unavailable("Inf-CL takes D in multiples of 256 and rows in multiples of 64")

    def function(z0: Tensor, z1: Tensor) -> Tensor:
        z = normalize(torch.cat([z0, z1]), dim=1)
        labels = partners(len(z), z.device)
        return flash(z, z, labels=labels, scale=1 / case.temperature, head_dim=head).mean()

    return function


def _siglip(case) -> Function:
    needs_gpu("siglip-kernel")
    loss = load("siglip_kernel", "siglip-kernel").fused_siglip_loss
    device = case.upstream().device
    log_temperature = torch.tensor(1 / case.temperature, device=device).log()
    bias = torch.tensor(-10.0, device=device)

    def function(z0: Tensor, z1: Tensor) -> Tensor:
        z = normalize(torch.cat([z0, z1]), dim=1)
        return loss(z, z, log_temperature, bias)

    return function


CONTENDERS = [
    *ours("nt_xent", _ours),
    Contender(PLAIN, _plain),
    Contender("torch.compile", lambda case: compiled(_plain(case))),
    Contender("lightly", _lightly),
    Contender("pytorch-metric-learning, SupCon", _metric_learning_labels),
    Contender("pytorch-metric-learning, NTXent", _metric_learning_pairs),
    # The nearest of what they have: it leaves each view among its own negatives.
    Contender("Inf-CL, self not masked", _inf_cl, exact=lambda case, way: case.unmasked(way)),
    # Another loss, of a sigmoid for each pair of views: the same products, no softmax.
    Contender("siglip-kernel, another loss", _siglip, yardstick=True),
]


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def plain_dcl(case) -> Function:
    def function(z0: Tensor, z1: Tensor) -> Tensor:
        z = normalize(_wide(torch.cat([z0, z1])), dim=1)
        image = torch.arange(len(z), device=z.device) % len(z0)
        scores = (z @ z.T / case.temperature).masked_fill(image[:, None] == image, -torch.inf)
        positive = (z * z.roll(len(z0), 0)).sum(1) / case.temperature
        return (scores.logsumexp(1) - positive).mean()

    return function


def plain_supcon(case) -> Function:
    labels = case.labels()

    def function(z: Tensor) -> Tensor:
        z = normalize(_wide(z), dim=1)
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        scores = z @ z.T / case.temperature
        positive = (labels[:, None] == labels) & ~own
        log_p = scores - scores.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
        return -((log_p * positive).sum(1) / positive.sum(1)).mean()

    return function


def plain_info_nce(case) -> Function:
    def function(a: Tensor, b: Tensor) -> Tensor:
        a, b = (normalize(_wide(z), dim=1) for z in (a, b))
        logits, target = a @ b.T / case.temperature, torch.arange(len(a), device=a.device)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    return function


def _ours_dcl(case, backend: str) -> Function:
    return lambda z0, z1: dcl(z0, z1, temperature=case.temperature, backend=backend)


def _ours_supcon(case, backend: str) -> Function:
    labels = case.labels()
    return lambda z: supcon(z, labels, temperature=case.temperature, backend=backend)


def _ours_info_nce(case, backend: str) -> Function:
    return lambda a, b: info_nce(a, b, logit_scale=1 / case.temperature, backend=backend)


def _lightly_dcl(case) -> Function:
    return lightly_losses().DCLLoss(temperature=case.temperature)


def _metric_learning_supcon(case) -> Function:
    losses = load("pytorch_metric_learning.losses", "pytorch-metric-learning")
    loss, labels = losses.SupConLoss(temperature=case.temperature), case.labels()
    return lambda z: loss(z, labels)


DCL = [
    *ours("dcl", _ours_dcl),
    Contender(PLAIN, plain_dcl),
    Contender("torch.compile", lambda case: compiled(plain_dcl(case))),
    Contender("lightly", _lightly_dcl),
]
SUPCON = [
    *ours("supcon", _ours_supcon),
    Contender(PLAIN, plain_supcon),
    Contender("torch.compile", lambda case: compiled(plain_supcon(case))),
    Contender("pytorch-metric-learning", _metric_learning_supcon),
]
INFO_NCE = [
    *ours("info_nce", _ours_info_nce),
    Contender(PLAIN, plain_info_nce),
    Contender("torch.compile", lambda case: compiled(plain_info_nce(case))),
]
