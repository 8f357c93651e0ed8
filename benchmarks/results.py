"""The file that a run of the benchmarks leaves: where it ran, what it can do, each outcome."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks import floors
from benchmarks.contest import AGAIN, Case, Outcome, noise
from benchmarks.environment import environment

FOLDER = Path(__file__).parent / "results"


class Results:
    """Results written to a file, whole and anew after each contest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {**environment(), "floors": {}, "contests": []}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, operation: str, case: Case, way: str, outcomes: dict[str, Outcome]) -> None:
        floor = case.work(way).floor(case.precision)
        self.content["floors"] = floors.measured()
        self.content["contests"].append(
            {
                "operation": operation,
                "case": case.describe(),
                "pass": way,
                "floor": floor,
                "noise": noise(outcomes),
                "contenders": {
                    name: _entry(outcome, floor)
                    for name, outcome in outcomes.items()
                    if not name.endswith(AGAIN)
                },
            }
        )
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)


def _entry(outcome: Outcome, floor: float) -> dict[str, Any]:
    """In seconds and bytes."""
    if outcome.status != "ok":
        return {"status": outcome.status, "reason": outcome.reason}
    return {
        "status": "ok",
        "median": outcome.median,
        "fastest": min(outcome.seconds),
        "rounds": len(outcome.seconds),
        "share_of_floor": floor / outcome.median,
        "peak_bytes": outcome.peak_bytes,
        "error": outcome.error,
        **outcome.extra,
    }
