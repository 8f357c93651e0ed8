"""The parts of a document that are made from results: each between two marks of its name."""

from __future__ import annotations

from collections.abc import Mapping


def fill(document: str, made: Mapping[str, str]) -> str:
    """The document with what stands between <!-- NAME --> and <!-- /NAME --> made anew.

    Raises ValueError for a name whose marks are not there.
    """
    for name, text in made.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = document.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"expected {start} and then {end} in it")
        document = f"{before}{start}\n\n{text.strip()}\n\n{end}{after}"
    return document
