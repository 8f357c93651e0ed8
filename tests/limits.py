"""How long a test waits for what should come: no machine is so slow, only a hang takes as long."""

from __future__ import annotations

import time
from collections.abc import Iterator

HANG = 3600  # seconds


def until_hang() -> Iterator[None]:
    """Again and again, a moment apart; an error in the end."""
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        yield
        time.sleep(0.005)
    raise AssertionError(f"it has not come in {HANG} s")
