"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gcrl.config import ConfigError
from gcrl.run import resolve_device

PATIENCE = timedelta(days=1)  # one process evaluates or loads data while the others wait


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

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        self.largest(0)

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


@contextmanager
def join(device: str) -> Iterator[Team]:
    """This process's place: alone, or beside those that torchrun started (NCCL on GPUs, else gloo).

    Raises:
        ConfigError: the device is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(find_device(device))
        return
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device: {size} processes take a GPU each: expected 'cuda', got {device!r}"
        )
    place = find_device(device)
    if place.type == "cuda":
        place = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Team(place, dist.get_rank(), size, dist.group.WORLD, control)
    finally:
        dist.destroy_process_group()


def find_device(device: str) -> torch.device:
    """What a name of a device means here, as gcrl.run.resolve_device has it.

    Raises ConfigError for one that torch does not know or that is not here.
    """
    try:
        return resolve_device(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
