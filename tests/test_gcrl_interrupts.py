"""Signals while a run trains: noted for the end of the step, and the second of a kind obeyed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from gcrl.interrupts import SIGNALS, Interrupts


@pytest.fixture
def former() -> Iterator[list[int]]:
    """The signals that reach the handlers from before, which would end the process."""
    reached: list[int] = []
    before = {n: signal.signal(n, lambda number, _: reached.append(number)) for n in SIGNALS}
    yield reached
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_second_signal_of_a_kind_acts_at_once(former: list[int]) -> None:
    with Interrupts(insist=True) as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        assert former == []
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert former == [signal.SIGINT, signal.SIGTERM]


def test_without_insisting_every_signal_waits_for_the_step(former: list[int]) -> None:
    with Interrupts(insist=False) as interrupts:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM
        assert former == []
    signal.raise_signal(signal.SIGTERM)
    assert former == [signal.SIGTERM]
