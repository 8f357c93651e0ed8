from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType

import missing
import pytest
import torch
from emulation import Emulator

from gcrl_kernels import backends

missing.stand_in_for_hypothesis()
from hypothesis import settings  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks, which is not installed

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers are the threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


# The same examples on every run, however slow the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return missing.Module.from_parent(parent, path=module_path)


def pytest_collection_finish() -> None:
    missing.take_the_stand_in_away()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """What a test imports when it runs."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing.skip_for_want_of(error, item.name)
        raise


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


@pytest.fixture(scope="session")
def emulator(
    root: Path, setup_script: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Emulator:
    """Compiles CUDA kernels to run on the CPU."""
    return Emulator(root, setup_script, tmp_path_factory)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=backends.cpu_levels() or ["none"])
def every_cpu_level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set of this CPU; outputs hold NaN until they are written."""
    reason = backends.unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True)  # this fills new memory
    try:
        with backends.use_cpu_level(request.param):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
