"""Ctrl-C and SIGTERM, which end a run at the next step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(RuntimeError):
    """A signal ended the run after it had saved a checkpoint."""

    def __init__(self, signal_number: int, step: int, folder: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"{name}: saved step {step}; go on with: gcrl train --resume --out {folder}"
        )
        self.exit_code = 128 + signal_number


class Interrupts:
    """While entered, `received` is the last signal that came, 0 if none did.

    insist: a second signal of the same kind acts as it would have otherwise. (torchrun repeats
    those that its processes have had already.)
    """

    def __init__(self, *, insist: bool) -> None:
        self.received = 0
        self._insist = insist
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._insist:
            signal.signal(number, self._former[number])
