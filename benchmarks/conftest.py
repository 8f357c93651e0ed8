"""How the benchmarks run under pytest: a contest per case and pass, and a test per contender in it.

The contest is held when its first test comes; each test then plays its contender's times back to
pytest-benchmark, on a clock of their own. With --results they go to a file as well, contest by
contest, so that nothing is lost when a run is cut short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import contest
from benchmarks.environment import environment
from benchmarks.results import Results


class _Clock:
    """A timer whose time passes only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = _Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write the results to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    options.benchmark_columns = options.benchmark_columns or ["median", "iqr", "rounds"]  # it fits
    path = config.getoption("--results")
    config.stash[RESULTS] = None if path is None else Results(path)


RESULTS: pytest.StashKey[Results | None] = pytest.StashKey()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and "contender" in parameters.params:
            case, way = parameters.params["case"], parameters.params["way"]
            group = f"{item.originalname}: {case}, {way}"  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.benchmark(group=group, timer=CLOCK))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """As many threads from the first test to the last."""
    torch.set_num_threads(torch.get_num_threads())


@pytest.fixture(scope="module")
def held() -> dict[Any, dict[str, contest.Outcome]]:
    """The outcomes of a module's contests."""
    return {}


@pytest.fixture
def report(
    request: pytest.FixtureRequest, held: dict[Any, dict[str, contest.Outcome]]
) -> Callable[..., None]:
    """Tells how a contender did on a case; the first to ask has the contest held."""

    def tell(case: contest.Case, way: str, contender: contest.Contender) -> None:
        key = request.node.originalname, case, way
        if key not in held:
            held[key] = contest.hold(case, way, _selected(request, case, way))
            results = request.config.stash[RESULTS]
            if results is not None:
                results.add(request.node.originalname.removeprefix("test_"), case, way, held[key])
        _play_back(request, held[key][contender.name])

    return tell


def _selected(
    request: pytest.FixtureRequest, case: contest.Case, way: str
) -> Sequence[contest.Contender]:
    """The contenders of a contest that this run was asked for (-k leaves some out)."""
    chosen = []
    for item in request.session.items:
        same = getattr(item, "originalname", None) == request.node.originalname
        if same and item.callspec.params["case"] == case and item.callspec.params["way"] == way:
            chosen.append(item.callspec.params["contender"])
    return chosen


def _play_back(request: pytest.FixtureRequest, outcome: contest.Outcome) -> None:
    if outcome.status == "skipped":
        pytest.skip(outcome.reason)
    if outcome.status != "ok":
        pytest.fail(f"{outcome.status}: {outcome.reason}", pytrace=False)
    durations = iter(outcome.seconds)

    def pass_time() -> None:
        CLOCK.now += next(durations)

    benchmark = request.getfixturevalue("benchmark")
    benchmark.pedantic(pass_time, rounds=len(outcome.seconds))
    benchmark.extra_info.update(peak_bytes=outcome.peak_bytes, error=outcome.error)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """In results, the machine without its name, the versions and the commit."""
    machine_info.clear()
    machine_info.update(environment())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: object, commit_info: dict[str, Any]) -> None:
    commit_info.clear()  # machine_info has it
