"""Compiles CUDA kernels for the CPU, with tests/cuda_emulator in place of the language."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from limits import HANG

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class Emulator:
    """A C++ compiler, and a folder that the workers of a test run share for what it makes."""

    def __init__(self, root: Path, setup_script: ModuleType, factory: pytest.TempPathFactory):
        compiler = setup_script.find_compiler()
        if compiler is None:
            pytest.skip("no C++ compiler here")
        self.compiler = shlex.split(compiler)
        self.root, self.torch_version = root, setup_script.TORCH
        temporary = factory.getbasetemp()
        self.folder = temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary

    def program(self, source: str, *flags: str) -> Path:
        """The program of one file of tests/cuda_emulator."""
        return self._compile(source, "program", flags)

    def library(self, source: str, *flags: str) -> Path:
        """A library of operators for torch.ops.load_library."""
        from torch.utils.cpp_extension import library_paths

        flags = (*flags, "-shared", "-fPIC", "-fvisibility=hidden", *self.torch_includes())
        flags += tuple(f"-L{path}" for path in library_paths())
        return self._compile(source, "library", flags, ["-lc10", "-ltorch", "-ltorch_cpu"])

    def torch_includes(self) -> list[str]:
        from torch.utils.cpp_extension import include_paths

        return [self.torch_version, *(f"-isystem{path}" for path in include_paths())]

    def sanitizes(self) -> bool:
        """Whether the compiler's address sanitizer works here."""
        program = self.folder / "sanitized"
        words = [*self.compiler, *SANITIZERS, "-x", "c++", "-", "-o", program]
        compiled = subprocess.run(words, input="int main() {}", text=True, capture_output=True)
        return compiled.returncode == 0 and subprocess.run([program]).returncode == 0

    def sanitized_environment(self, *python_path: Path) -> dict[str, str]:
        """For a Python that loads sanitized libraries."""
        return {
            **os.environ,
            "LD_PRELOAD": " ".join(self._runtime(name) for name in ("libasan.so", "libstdc++.so")),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, python_path)),
        }

    def _runtime(self, library: str) -> str:
        words = [*self.compiler, f"-print-file-name={library}"]
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()

    def run_sanitized(self, script: str, source: str) -> None:
        """A Python script, which prints "done", with the sanitized library of one file."""
        if not self.sanitizes():
            pytest.skip("the compiler has no address sanitizer here")
        environment = self.sanitized_environment(self.root, self.root / "tests")
        words = [sys.executable, "-c", script, self.library(source, *SANITIZERS)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=HANG)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout == "done\n"

    def _compile(
        self, source: str, kind: str, flags: Sequence[str], libraries: Sequence[str] = ()
    ) -> Path:
        here = self.root / "tests" / "cuda_emulator"
        sanitized = "-sanitized" if set(SANITIZERS) & set(flags) else ""
        product = self.folder / f"{Path(source).stem}{sanitized}.{kind}"
        includes = [f"-I{here}", f"-I{self.root / 'csrc'}"]  # the emulator's headers come first
        warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        words = [*self.compiler, "-std=c++20", "-g", *warnings, *includes, *flags, here / source]
        with (self.folder / f"{product.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not product.exists():
                words += [*libraries, "-o", product]
                done = subprocess.run(words, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
        return product
