"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gcrl.config import Config, ConfigError
from gcrl.run import resolve_device

PATIENCE = timedelta(days=1)  # while one process fetches data or fits a palette for all


@dataclass(frozen=True)
class Team:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """All processes, on the device; None for one process."""
    control: dist.ProcessGroup | None = None
    """All processes, on the CPU: decisions without waiting for the device."""
    patient: dist.ProcessGroup | None = None
    """As control, with a patience that outlasts what one process does for all."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self, *, patiently: bool = False) -> None:
        """Until every process is here."""
        if self.group is not None:
            dist.all_reduce(torch.zeros(()), group=self.patient if patiently else self.control)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.group is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return int(numbers)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, on the CPU."""
        values = values.cpu()
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.control)
            values /= self.size
        return values

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigError, on every process, where a JSON value is not the same on all."""
        if self.group is None:
            return
        own = json.dumps(values, sort_keys=True).encode()
        padded = torch.zeros(self.largest(len(own)), dtype=torch.uint8)
        padded[: len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.control)
        everyone = [json.loads(bytes(part.tolist()).rstrip(b"\0")) for part in parts]
        names = dict.fromkeys(name for each in everyone for name in each)
        differing = [
            name for name in names if any(e.get(name) != everyone[0].get(name) for e in everyone)
        ]
        if differing:
            texts = "; ".join(
                _describe(name, [each.get(name) for each in everyone]) for name in differing
            )
            raise ConfigError(f"the processes of the run were started differently: {texts}")


def _describe(name: str, values: list[Any]) -> str:
    """Such as "steps: 600 on rank 0, 900 on ranks 1, 2"."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(repr(value), []).append(str(rank))
    parts = (f"{value} on rank{'s' * (len(on) > 1)} {', '.join(on)}" for value, on in ranks.items())
    return f"{name}: {', '.join(parts)}"


@contextmanager
def join(config: Config, started_with: Mapping[str, Any]) -> Iterator[Team]:
    """This process's place: alone, or beside those that torchrun started (NCCL on GPUs, else gloo).

    started_with: JSON values that must be the same on every process.

    Raises:
        ConfigError: the device is not there, or the processes were started differently.
    """
    size, device = int(os.environ.get("WORLD_SIZE", "1")), config.runtime.device
    if size == 1:
        yield Team(find_device(device))
        return
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device: {size} processes take a GPU each: expected 'cuda', got {device!r}"
        )
    timeout = timedelta(minutes=config.runtime.timeout)
    dist.init_process_group("gloo", timeout=timeout)
    try:
        control, rank = dist.group.WORLD, dist.get_rank()
        Team(torch.device("cpu"), rank, size, control, control).check_same(started_with)
        place, group = find_device(device), control
        if place.type == "cuda":
            place = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(place)
            group = dist.new_group(backend="nccl", timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Team(place, rank, size, group, control, patient)
    finally:
        dist.destroy_process_group()


def average_gradients(model: nn.Module, team: Team) -> None:
    """The mean over the processes, in place.

    All are summed at once in the parameters' order, so that a run that goes on adds in the same
    order as one that was never interrupted, with any number of processes.
    """
    if team.group is None:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together, group=team.group)
    together /= team.size
    parts = together.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


def find_device(device: str) -> torch.device:
    """What a name of a device means here, as gcrl.run.resolve_device has it.

    Raises ConfigError for one that torch does not know or that is not here.
    """
    try:
        return resolve_device(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
