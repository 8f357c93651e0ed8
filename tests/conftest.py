from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
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


# Begun last, they would leave one worker waiting for the other.
LONG = (
    "test_they_find_nothing", "test_within_its_memory", "test_build.py", "test_gcrl_study.py",
    "test_axial_attention_triton.py", "test_gcrl_trainer.py", "test_gcrl_distributed.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long tests first, where a worker that has nothing left to do takes from another."""
    if config.getoption("dist", None) == "worksteal":
        items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A cache for torch.compile of this run's own: PyTorch's own knows nothing of our operators'
    shapes, so what other versions of the kernels left there may be wrong for these.
    """
    if not hasattr(config, "workerinput"):
        folder = TemporaryDirectory(prefix="gcrl-compiled-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)


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


@pytest.fixture(params=["reference", *(f"cpu-{level}" for level in backends.cpu_levels())])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend for tensors on the CPU, the compiled one with each of its instruction sets.

    Outputs hold NaN until they are written.
    """
    name, _, level = request.param.partition("-")
    torch.use_deterministic_algorithms(True)  # this fills new memory
    try:
        with backends.use_cpu_level(level) if level else nullcontext():
            yield name
    finally:
        torch.use_deterministic_algorithms(False)


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
