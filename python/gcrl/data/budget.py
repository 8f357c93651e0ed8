"""How much memory reading images may take, which is asked before anything is decoded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gcrl.config import ConfigError, DataConfig
from gcrl.data.dataset import DataError
from gcrl.memory import give_back

GIGABYTE = 10**9
SMALL = 128  # this part of the limit may stay with a thread that has freed it
_gigabytes = ContextVar("max_gigabytes", default=DataConfig.max_gigabytes)


@contextmanager
def memory_limit(gigabytes: float) -> Iterator[None]:
    """Within it, `load_dataset` takes so much memory at most, about; outside, 4 gigabytes.

    Raises ConfigError for what is no positive number.
    """
    if not 0 < gigabytes < float("inf"):
        raise ConfigError(f"max_gigabytes: expected a number above 0, got {gigabytes}")
    token = _gigabytes.set(gigabytes)
    try:
        yield
    finally:
        _gigabytes.reset(token)


class Budget:
    """The memory that one reader and its threads share, in bytes."""

    def __init__(self) -> None:
        self.limit = int(_gigabytes.get() * GIGABYTE)
        self._kept = 0
        self._lent = 0
        self._changed = threading.Condition()

    def keep(self, size: int) -> None:
        """Count `size` as taken from now on; raises DataError where that is too much."""
        self._check(size)
        self._kept += size

    @contextmanager
    def lend(self, size: int) -> Iterator[None]:
        """Within it `size` is taken; waits until other threads have left enough.

        Raises DataError where it would be too much on its own.
        """
        self._check(size)
        with self._changed:
            self._changed.wait_for(lambda: self._kept + self._lent + size <= self.limit)
            self._lent += size
        try:
            yield
        finally:
            if size > self.limit // SMALL:
                give_back()
            with self._changed:
                self._lent -= size
                self._changed.notify_all()

    def _check(self, size: int) -> None:
        if self._kept + size > self.limit:
            raise DataError(
                f"would take {_gigabyte_text(self._kept + size)} of memory, more than {self}"
            )

    def __str__(self) -> str:
        return f"the {_gigabyte_text(self.limit)} that --max-gigabytes allows"


def _gigabyte_text(size: int) -> str:
    return f"{size / GIGABYTE:,.3g} GB" if size < 1000 * GIGABYTE else f"{size // GIGABYTE:,} GB"
