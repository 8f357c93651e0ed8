"""What the CUDA compiler says of a kernel's resources."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths


class Compiled(NamedTuple):
    """A kernel for an architecture; bytes of stack and spills, registers a thread."""

    kernel: str
    architecture: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


def resources(root: Path, setup_script: ModuleType, folder: Path, source: str) -> list[Compiled]:
    """Of each kernel of csrc/<source>, from the last build where that is not older."""
    report = root / "build" / "kernels" / "csrc" / f"{source}.o.log"
    used = [*(root / "csrc" / source).parent.iterdir(), *(root / "csrc" / "common").iterdir()]
    if not report.exists() or report.stat().st_mtime < max(s.stat().st_mtime for s in used):
        report = folder / "report"
        report.write_text(_compile(root, setup_script, folder, source))
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'(?:.*\n)*?.* (\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
        report.read_text(),
    )
    return [Compiled(name, architecture, *map(int, n)) for name, architecture, *n in found]


def _compile(root: Path, setup_script: ModuleType, folder: Path, source: str) -> str:
    nvcc, compiler = setup_script.find_nvcc(), setup_script.find_compiler()
    if nvcc is None or compiler is None:
        pytest.skip("no nvcc here")
    words = setup_script.cuda_command(compiler, include_paths())
    words += ["-c", root / "csrc" / source, "-o", folder / "object.o"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr
