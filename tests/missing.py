"""What the tests do without a package that is not installed: what needs it is skipped, and says so.

The kernels need none of these packages, so a kernel's test is never skipped but for the ones that
hypothesis draws examples for. Where CI is set nothing is skipped: there a missing package is an
error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

OPTIONAL = {
    "kornia", "matplotlib", "PIL", "safetensors", "sklearn", "tensorboard", "torchmetrics", "tqdm",
    "tyro",
}  # fmt: skip
_STAND_IN: dict[str, Any] = {}
STRICT = os.environ.get("CI", "").lower() in ("1", "true")


class Module(pytest.Module):
    """A file of tests that is skipped if what it imports imports an optional package in vain."""

    def collect(self) -> Any:
        try:
            return super().collect()
        except self.CollectError as error:
            skip_for_want_of(error.__cause__, self.path.name)
            raise


def skip_for_want_of(error: BaseException | None, what: str) -> None:
    """Skips, with the reason, if the error is the absence of an optional package."""
    if not isinstance(error, ModuleNotFoundError) or STRICT:
        return
    package = (error.name or "").partition(".")[0]
    if package in OPTIONAL:
        reason = f"{what} needs {package}, which is not installed"
        pytest.skip(reason, allow_module_level=True)


class _Settings:
    """Of hypothesis, where there is none: changes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, test: Callable[..., Any]) -> Callable[..., Any]:
        return test

    register_profile = load_profile = staticmethod(lambda *_, **__: None)


def stand_in_for_hypothesis() -> None:
    """Where hypothesis is not installed, lets test files import it: their `given` skips a test."""
    if STRICT or find_spec("hypothesis") is not None:
        return
    module: Any = ModuleType("hypothesis")
    module.__spec__ = ModuleSpec("hypothesis", None)
    module.example = lambda *_, **__: lambda test: test
    module.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")
    module.settings = _Settings
    module.strategies = module.HealthCheck = MagicMock()
    _STAND_IN.update({"hypothesis": module, "hypothesis.strategies": module.strategies})
    sys.modules.update(_STAND_IN)


def take_the_stand_in_away() -> None:
    """Once the test files are imported: nobody else is to take it for the real one."""
    for name in _STAND_IN:
        sys.modules.pop(name, None)
