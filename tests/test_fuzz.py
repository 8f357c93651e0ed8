"""Every public function with arguments drawn at random; `python -m tests.fuzz` draws more."""

from __future__ import annotations

import missing
import pytest

import gcrl_kernels
from gcrl_kernels import modules

PUBLIC = [*gcrl_kernels.__all__, *modules.__all__]
PUBLIC.remove("BackendUnavailableError")
EXAMPLES = {"right": 250, "wrong": 200}  # about a minute for all functions


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("function", PUBLIC)
def test_calls_are_answered_rightly(function: str, kind: str) -> None:
    """With the value, or, where an argument is wrong, with an error that names it."""
    if not missing.STRICT:
        pytest.importorskip("hypothesis")
    from fuzz.runner import run

    run(function, kind, EXAMPLES[kind])
