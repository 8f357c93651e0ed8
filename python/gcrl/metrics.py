"""What is recorded while a run trains: metrics.jsonl, TensorBoard and the means between records."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcrl.checkpoint import replace_file
from gcrl.config import parse_json

FILE = "metrics.jsonl"


class Recorder:
    """Writes records, one JSON object a line, each with its 'step', and the same to TensorBoard.

    A run that goes on after `step` drops the records that lie behind it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / FILE
        replace_file(path, _lines_until(path, step))
        self.file = path.open("a", encoding="utf-8")
        self.board = Board(folder / "tensorboard", step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Numbers that do not apply are None: null in the file, absent from TensorBoard."""
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        self.board.add(record["step"], {k: v for k, v in record.items() if v is not None})

    def flush(self) -> None:
        """See all records onto the disk."""
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()


class Board:
    """A file of TensorBoard's, written at once by who calls: an error is the caller's to see.

    TensorBoard drops what it has of another file from `first_step` on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():019}.{socket.gethostname()}.{os.getpid()}"
        self.file = (folder / name).open("wb", buffering=0)
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step, session_log=started)

    def add(self, step: int, values: dict[str, float]) -> None:
        scalars = [
            self.summary.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if name != "step"
        ]
        self._write(step=step, summary=self.summary.Summary(value=scalars))

    def _write(self, **content: Any) -> None:
        event = self.event.Event(wall_time=time.time(), **content)
        self.records.write(event.SerializeToString())

    def flush(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


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
        if len(sums) != len(self.sums) or type(count) is not int:
            raise ValueError(f"expected {len(self.sums)} sums and a count")
        self.sums.copy_(torch.tensor(sums))
        self.count = count


def read(path: Path, *names: str) -> list[dict[str, Any]]:
    """The records of a run, up to the first that is damaged; none where there is no file.

    They hold numbers or None, 'step' and the other names being above 0.
    """
    return [record for _, record in _records(path, *names)]


def _lines_until(path: Path, step: int) -> bytes:
    """The whole records up to the step; a last line that was cut short goes too."""
    lines = [line for line, record in _records(path) if record["step"] <= step]
    return b"".join(lines)


def _records(path: Path, *names: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not _is_record(record, "step", *names):
            return
        yield line, record


def _is_record(record: Any, *names: str) -> bool:
    return (
        isinstance(record, dict)
        and all(type(value) in (int, float, type(None)) for value in record.values())
        and all((record.get(name) or 0) > 0 for name in names)
    )
