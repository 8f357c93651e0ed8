"""The records of a run, as files and as TensorBoard shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcrl.metrics import Recorder


def record(folder: Path, step: int, *records: dict[str, Any]) -> None:
    recorder = Recorder(folder, step)
    for values in records:
        recorder.write(values)
    recorder.close()


def test_tensorboard_shows_the_records(tmp_path: Path) -> None:
    first = {"step": 1, "loss": 2.5, "contrastive": None}
    record(tmp_path, 0, first, {**first, "step": 7, "loss": 1.5})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.5), (7, 1.5)]
    assert board.Tags()["scalars"] == ["loss"]


def test_a_run_that_goes_on_drops_what_lies_behind_it(tmp_path: Path) -> None:
    record(tmp_path, 0, *({"step": step, "loss": 1.0} for step in (1, 7, 14)))
    record(tmp_path, 10, {"step": 14, "loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (7, 1.0), (14, 2.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert shown == [(1, 1.0), (7, 1.0), (14, 2.0)]
