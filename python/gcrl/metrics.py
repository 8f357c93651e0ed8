"""What is recorded while a run trains: metrics.jsonl, TensorBoard and the means between records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcrl.checkpoint import replace_file

FILE = "metrics.jsonl"


class Recorder:
    """Writes records, one JSON object a line, each with its 'step', and the same to TensorBoard.

    A run that goes on after `step` drops the records that lie behind it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / FILE
        replace_file(path, _lines_until(path, step))
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Numbers that do not apply are None: null in the file, absent from TensorBoard."""
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """See all records onto the disk."""
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()


class Window:
    """Sums over the steps since the last record, kept on the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.sums = torch.zeros(size, device=device)
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.sums += values
        self.count += 1

    def reset(self) -> None:
        self.sums.zero_()
        self.count = 0

    def restore(self, sums: list[float], count: int) -> None:
        self.sums.copy_(torch.tensor(sums))
        self.count = count


def _lines_until(path: Path, step: int) -> bytes:
    """The whole records up to the step; a last line that was cut short goes too."""
    kept = b""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept += line
    return kept
