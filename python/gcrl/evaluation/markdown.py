"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def rows(
    header: Iterable[str], lines: Iterable[tuple[Any, ...]], text: Callable[[float], str]
) -> Iterator[str]:
    """A table of named rows of numbers; texts stand as they are, None as an empty cell."""
    names = list(header)
    yield f"| {' | '.join(names)} |"
    yield "|---" + "|---:" * (len(names) - 1) + "|"
    for name, *cells in lines:
        yield f"| {name} | {' | '.join(_cell(cell, text) for cell in cells)} |"


def number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _cell(value: Any, text: Callable[[float], str]) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else text(value)
