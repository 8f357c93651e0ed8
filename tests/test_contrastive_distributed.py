"""NT-Xent over several gloo processes against one process that has the joint batch."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comparison import backends_here
from limits import HANG
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from gcrl_kernels import dcl, info_nce, nt_xent
from gcrl_kernels.contrastive.distributed import _ring, anchor_losses
from gcrl_kernels.contrastive.reference import OTHERS
from gcrl_kernels.modules import NTXentLoss

IMAGES, FEATURES = 3, 4


class Encoder(nn.Module):
    """A linear map and a temperature, both learnt, in float64 for the reference."""

    def __init__(self, backend: str = "reference") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dtype = torch.float64 if backend == "reference" else torch.float32
        self.linear = nn.Linear(FEATURES, 5).to(self.dtype)
        self.log_temperature = nn.Parameter(torch.tensor(-1.0, dtype=self.dtype))

    def forward(self, x0: Tensor, x1: Tensor, loss: str, options: dict) -> Tensor:
        z0, z1 = (self.linear(x.to(self.dtype)) for x in (x0, x1))
        temperature = self.log_temperature.exp()
        if loss == "info_nce":
            return info_nce(z0, z1, logit_scale=1 / temperature, **options)
        options = {name: _to(value, self.dtype) for name, value in options.items()}
        return {"nt_xent": nt_xent, "dcl": dcl}[loss](z0, z1, temperature=temperature, **options)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def joint_batch(ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (ranks * IMAGES, FEATURES)
    x0, x1 = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, x1, torch.randn(2, 5, generator=generator, dtype=torch.float64)


def start(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=HANG)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)


def stop() -> None:
    """End a process that has succeeded."""
    dist.barrier()  # a process that leaves early would break the others' connections
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group and abort an interpreter that shuts down


class Case(NamedTuple):
    """How the ranks compute a loss together."""

    loss: str
    gather: str
    reduction: str
    further: bool
    backend: str

    def options(self, negatives: Tensor) -> dict[str, Any]:
        return {"reduction": self.reduction} | ({"negatives": negatives} if self.further else {})


BACKENDS = backends_here("nt_xent")
CASES = [
    Case(loss, gather, reduction, further and loss != "info_nce", backend)
    for loss in ("nt_xent", "dcl", "info_nce")
    for gather, reduction, further in (
        ("all", "mean", True),
        ("ring", "none", False),
        ("all", "none", False),
        ("ring", "mean", True),
    )
    for backend in BACKENDS
]


def run_rank(rank: int, ranks: int, folder: str) -> None:
    start(rank, ranks, folder)
    x0, x1, negatives = joint_batch(ranks)
    own = slice(rank * IMAGES, (rank + 1) * IMAGES)
    results = []
    for case in CASES:
        model = DistributedDataParallel(Encoder(case.backend))
        together = {"group": dist.group.WORLD, "gather": case.gather, "backend": case.backend}
        loss = model(x0[own], x1[own], case.loss, case.options(negatives) | together)
        if case.reduction == "none":
            loss = (loss * upstream(ranks)[:, own].flatten()).sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    stop()


def upstream(ranks: int) -> Tensor:
    """Uneven gradients of the anchors' losses, [2, R N]."""
    return torch.linspace(0.5, 2, 2 * ranks * IMAGES, dtype=torch.float64).view(2, -1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_averaged_gradients_are_those_of_the_joint_batch(tmp_path, ranks) -> None:
    mp.spawn(run_rank, (ranks, str(tmp_path)), nprocs=ranks)
    of_ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    x0, x1, negatives = joint_batch(ranks)
    for case, *results in zip(CASES, *of_ranks, strict=True):
        model = Encoder()
        loss = model(x0, x1, case.loss, case.options(negatives))
        if case.reduction == "none":
            # Each rank sums its own anchors; averaging the gradients divides their total by the
            # ranks.
            loss = (loss * upstream(ranks).flatten()).sum() / ranks
        loss.backward()
        losses = torch.stack([result[0] for result in results]).double()
        exact = {"rtol": 1e-9, "atol": 1e-12}
        near = exact if case.backend == "reference" else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(losses.mean(), loss.detach(), **near, msg=str(case))
        assert losses.std() > 0
        for result in results:
            for actual, parameter in zip(result[1:], model.parameters(), strict=True):
                torch.testing.assert_close(actual.double(), parameter.grad, **near, msg=str(case))


def run_uneven(rank: int, ranks: int, folder: str) -> None:
    start(rank, ranks, folder)
    z = torch.randn(3 + rank, 4)
    message = r"z0, z1: expected the same shape .* rank 0 has \[3, 4\], rank 1 has \[4, 4\]"
    with pytest.raises(ValueError, match=message):
        nt_xent(z, z, group=dist.group.WORLD)
    z = torch.randn(3, 4)
    for ours, name, others in (
        ({"z": z.double()}, "dtype", "torch.float32, rank 1 has torch.float64"),
        ({"gather": "ring"}, "gather", "all, rank 1 has ring"),
        ({"loss": dcl}, "candidates", "all but itself, rank 1 has all but itself and its partner"),
        ({"temperature": 0.25}, "scale", "2, rank 1 has 4"),
    ):
        options: dict[str, Any] = {"z": z, "loss": nt_xent, **(ours if rank else {})}
        loss, views = options.pop("loss"), options.pop("z")
        message = f"z0, z1: expected the same {name} on every rank, got: rank 0 has {others}"
        with pytest.raises(ValueError, match=message):
            loss(views, views, group=dist.group.WORLD, **options)
    assert nt_xent(z, z, group=dist.group.WORLD).isfinite()
    stop()


def test_uneven_batches_are_an_error_on_every_rank(tmp_path) -> None:
    mp.spawn(run_uneven, (2, str(tmp_path)), nprocs=2)


def run_without_the_others(rank: int, ranks: int, folder: str) -> None:
    start(rank, ranks, folder)
    z = torch.randn(3, 4)
    nt_xent(z, z, group=dist.group.WORLD)
    if rank > 0:
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"(?i)gloo.*(closed|reset|broken|refused)"):
        nt_xent(z, z, group=dist.group.WORLD)
    os._exit(0)


def test_a_process_that_has_gone_is_an_error_at_once(tmp_path) -> None:
    mp.spawn(run_without_the_others, (2, str(tmp_path)), nprocs=2)


def run_counting(rank: int, ranks: int, folder: str) -> None:
    """The ring's memory: what it yields lies in one place, besides the rank's own."""
    start(rank, ranks, folder)
    own = torch.full((2, 3), float(rank))
    seen = [
        (tensor.data_ptr(), float(tensor[0, 0])) for (tensor,) in _ring((own,), dist.group.WORLD)
    ]
    assert [value for _, value in seen] == [(rank - step) % ranks for step in range(ranks)]
    assert seen[0][0] == own.data_ptr()
    assert len({place for place, _ in seen}) == 2
    stop()


def test_a_ring_holds_two_ranks_at_once(tmp_path) -> None:
    mp.spawn(run_counting, (4, str(tmp_path)), nprocs=4)


def run_with_a_memory_bank(rank: int, ranks: int, folder: str) -> None:
    start(rank, ranks, folder)
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, ranks, 3, 5)  # every rank's
    bank = normalize(torch.randn(8, 5), dim=1)
    together, alone = (
        NTXentLoss(0.2, memory_bank_size=(8, 5), gather_distributed=distributed)
        for distributed in (True, False)
    )
    for module in (together, alone):
        module.bank.copy_(bank)
    own = z0[rank].clone().requires_grad_(), z1[rank]
    assert torch.equal(together(*own), alone(*own))
    torch.testing.assert_close(together.bank[: 3 * ranks], normalize(z1.flatten(0, 1), dim=1))
    assert torch.equal(together.bank[3 * ranks :], bank[3 * ranks :])
    uneven = torch.randn(3 + rank, 5, requires_grad=True)
    with pytest.raises(ValueError, match=r"out0, out1: expected the same shape .* has \[4, 5\]"):
        together(uneven, uneven)
    stop()


def test_a_memory_bank_takes_every_ranks_views(tmp_path) -> None:
    mp.spawn(run_with_a_memory_bank, (2, str(tmp_path)), nprocs=2)


def test_the_collectives_break_a_compiled_graph(tmp_path) -> None:
    start(0, 1, str(tmp_path))
    try:
        z, options = torch.randn(6, 4), (OTHERS, dist.group.WORLD, "all", True, "reference")

        def function(z: Tensor) -> Tensor:
            return anchor_losses(z.sin(), None, None, 0.5, *options)

        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(function, backend="eager", fullgraph=True)(z)
        assert torch.equal(torch.compile(function, backend="eager")(z), function(z))
    finally:
        dist.destroy_process_group()


def test_a_group_of_one_is_this_process(tmp_path) -> None:
    start(0, 1, str(tmp_path))
    try:
        z0, z1 = torch.randn(4, 3), torch.randn(4, 3)
        assert torch.equal(nt_xent(z0, z1, group=dist.group.WORLD), nt_xent(z0, z1))
    finally:
        dist.destroy_process_group()
