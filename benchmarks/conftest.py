from __future__ import annotations

from typing import Any

from environment import environment


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """In results, the machine without its name, the versions and the commit."""
    machine_info.clear()
    machine_info.update(environment())


def pytest_benchmark_update_commit_info(config: object, commit_info: dict[str, Any]) -> None:
    commit_info.clear()  # machine_info has it
