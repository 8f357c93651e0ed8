"""Every public function with arguments drawn at random; `python -m tests.fuzz` draws more."""

from __future__ import annotations

import pytest
from fuzz.runner import TARGETS, run

# About a minute in all.
EXAMPLES = {"right": 80, "wrong": 160}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function, kind", TARGETS)
def test_calls_are_answered_rightly(function: str, kind: str) -> None:
    run(function, kind, EXAMPLES[kind])
