"""Contenders of a training step: our model as it is, and the same one on other operations.

Each contender has a copy of the module `gcrl.model` for itself, executed from the same source, in
which the names of the three operations may stand for others. The peers' attention has the layout
that it copies nothing in: the projection's features are heads x 3 x D, not 3 x heads x D, so that
an image's rows are more of the batch and its columns' places more of the heads.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.profiler import record_function

import gcrl.model
from benchmarks.breakdown import OPTIMIZER, OUR_OPERATIONS, backward_too, shares
from benchmarks.contest import PLAIN, Contender, Whole
from benchmarks.peers.contrastive import lightly_losses
from gcrl.run import build_model
from gcrl.trainer import backward, learning_rate, make_optimizer

_NUMBERS = itertools.count()


def attention(qkv: Tensor, axis: int, *, causal: bool, backend: str | None = None) -> Tensor:
    """SDPA of a projection [B, H, W, heads, 3, D] along an axis, [B, H, W, heads, D]."""
    q, k, v = (_rows(tensor, axis) for tensor in qkv.unbind(-2))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(*qkv.shape[:4], qkv.shape[-1])


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """[B, H, W, heads, D] as [B·H, heads, W, D] or, down columns, [B, W·heads, H, D]: a view."""
    return (tensor.flatten(0, 1) if axis == 1 else tensor.flatten(2, 3)).transpose(1, 2)


def cross_entropy(
    hidden: Tensor,  # [..., C]
    weight: Tensor,  # [K, C]
    tokens: Tensor,  # int64 [...]
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """F.linear_cross_entropy; before PyTorch 2.13 F.cross_entropy of the logits."""
    targets = (tokens if mask is None else tokens.masked_fill(~mask, -100)).flatten()
    rows = hidden.flatten(0, -2)
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(rows, weight, targets, linear_bias=bias)
    return F.cross_entropy(F.linear(rows, weight, bias), targets)


def contrast(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A loss of two views [N, D] in the place of nt_xent: in float32, as that is."""

    def function(z0: Tensor, z1: Tensor, **_: Any) -> Tensor:
        with torch.autocast(z0.device.type, enabled=False):
            return loss(z0.float(), z1.float())

    return function


def nt_xent_by_hand(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """NT-Xent as people write it: the 2N x 2N similarities, the diagonal struck out."""

    def function(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]), dim=1)
        scores = z @ z.T / temperature
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        partners = torch.arange(len(z), device=z.device).roll(len(z0))
        return F.cross_entropy(scores.masked_fill(own, -torch.inf), partners)

    return function


def _block_forward(module: ModuleType) -> Callable[..., Tensor]:
    """Block.forward with the layout that the peers' attention needs, from the same weights."""

    def forward(block: Any, x: Tensor, attend: None = None) -> Tensor:
        weight, bias = (
            p.unflatten(0, (3, block.heads, -1)).transpose(0, 1).flatten(0, 2)
            for p in (block.qkv.weight, block.qkv.bias)
        )
        qkv = F.linear(block.attention_norm(x), weight, bias).unflatten(-1, (block.heads, 3, -1))
        out = module.axial_attention_packed(qkv, block.axis, causal=block.causal)
        x = x + block.merge(out.flatten(-2))
        return x + block.mlp(block.mlp_norm(x))

    return forward


def copy_of_the_model(operations: Mapping[str, Callable[..., Tensor]]) -> ModuleType:
    """The module `gcrl.model` executed once more, with other operations under their names."""
    name = f"gcrl_model_{next(_NUMBERS)}"
    spec = importlib.util.spec_from_file_location(name, gcrl.model.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # torch.compile looks it up
    spec.loader.exec_module(module)
    for operation, function in operations.items():
        setattr(module, operation, function)
    if "axial_attention_packed" in operations:
        module.Block.forward = _block_forward(module)  # type: ignore[attr-defined]
    return module


@dataclass
class Step(Whole):
    """A contender's model and optimiser; called, it takes a step: forward, backward, clip, AdamW.

    The weights are those that the configuration's seed gives; the learning rate is that of a run's
    first step, so that they hardly change. `compiled` says whether torch.compile makes the model.
    """

    case: Any  # bench_train_step.TrainStep
    operations: Mapping[str, Callable[..., Tensor]]
    compiled: bool = False
    module: ModuleType = field(init=False)
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        config, case = self.case.config, self.case
        self.module = copy_of_the_model(self.operations)
        with torch.device(case.device):
            self.model = self.module.GCRL(config.model)
        self.model.load_state_dict(build_model(config).state_dict())
        self.network = torch.compile(self.model, dynamic=False) if self.compiled else self.model
        self.optimizer = make_optimizer(self.model, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, 0)
        self.weak, self.strong = case.tokens()

    def __call__(self) -> Tensor:
        losses = self._backward()
        with record_function(OPTIMIZER):
            clip_grad_norm_(self.model.parameters(), self.case.config.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return losses

    def check(self) -> list[Tensor]:
        """Both losses, then each parameter's gradient, before any step."""
        generative, contrastive, _ = self._backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        self.optimizer.zero_grad(set_to_none=True)
        return [generative, contrastive, *gradients]

    def extra(self, seconds: float) -> dict[str, Any]:
        """Images a second, bytes of weights and optimiser, and each part's share of a step."""
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        held = [*self.model.parameters(), *(v for v in state if isinstance(v, Tensor))]
        return {
            "images_per_second": self.case.batch / seconds,
            "held_bytes": sum(tensor.nbytes for tensor in held),
            "where": self.where(),
        }

    def where(self) -> dict[str, float]:
        """The share of a step that each part has: of wall time on a CPU, of the GPU's own on one.

        Of a compiled step, an operation that the compiler has taken apart is in the rest.
        """
        if self.compiled:
            return shares(self)
        originals = {name: getattr(self.module, name) for name in OUR_OPERATIONS}
        try:
            for name, function in originals.items():
                setattr(self.module, name, backward_too(OUR_OPERATIONS[name], function))
            return shares(self)
        finally:
            for name, function in originals.items():
                setattr(self.module, name, function)

    def _backward(self) -> Tensor:
        """Leaves each parameter's gradient; the losses, [generative, contrastive, their sum]."""
        case = self.case
        autocast = case.precision != torch.float32
        return backward(
            self.network, self.weak, self.strong, case.config.objective, None, share=1,
            autocast=torch.autocast(case.device, case.precision) if autocast else nullcontext(),
        )  # fmt: skip


def pytorch(case: Any) -> dict[str, Callable[..., Tensor]]:
    """SDPA, F.linear_cross_entropy and NT-Xent as people write it."""
    return {
        "axial_attention_packed": attention,
        "linear_color_cross_entropy": cross_entropy,
        "nt_xent": contrast(nt_xent_by_hand(case.config.objective.temperature)),
    }


def with_lightly(case: Any) -> dict[str, Callable[..., Tensor]]:
    """SDPA, F.linear_cross_entropy and lightly's NTXentLoss."""
    loss = lightly_losses().NTXentLoss(case.config.objective.temperature)
    return {**pytorch(case), "nt_xent": contrast(loss)}


CONTENDERS = [
    Contender("gcrl_kernels eager", lambda case: Step(case, {})),
    Contender("gcrl_kernels torch.compile", lambda case: Step(case, {}, compiled=True)),
    Contender(PLAIN, lambda case: Step(case, pytorch(case))),
    Contender("torch.compile", lambda case: Step(case, pytorch(case), compiled=True)),
    Contender("PyTorch + lightly", lambda case: Step(case, with_lightly(case))),
    Contender(
        "torch.compile + lightly", lambda case: Step(case, with_lightly(case), compiled=True)
    ),
]
