"""Freed memory is taken again, and not given back to the kernel."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from gcrl import memory

PROGRAM = """
import resource, sys
import torch
from gcrl import memory
if sys.argv[1] == "kept":
    assert memory.keep_freed()
def faults():
    torch.ones(2**24).sum()  # 64 MiB; some are wasted until they fit
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    first = faults()
for _ in range(4):
    last = faults()
print(last - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    settings = ("MALLOC_", "GLIBC_TUNABLES")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(settings)}
    counts = {
        way: int(subprocess.check_output([sys.executable, "-c", PROGRAM, way], env=clean))
        for way in ("kept", "given back")
    }
    assert counts["kept"] < counts["given back"] / 10


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_settles_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr("ctypes.CDLL", None)
    assert not memory.keep_freed()


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr("ctypes.CDLL", None)
    assert not memory.keep_freed()
