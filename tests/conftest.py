from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers are the threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


settings.register_profile("repeatable", derandomize=True)  # the same examples on every run
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def setup_script() -> ModuleType:
    """setup.py as a module, which says what a build here would find."""
    spec = importlib.util.spec_from_file_location("gcrl_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
