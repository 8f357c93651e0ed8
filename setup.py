"""Builds the compiled kernels into plain shared libraries, lib*.so, inside the package.

They are no Python modules: `torch.ops.load_library` opens them, and one wheel serves every Python.
The C++ library is built where a C++ compiler is found, the CUDA library where nvcc is found as well
(no GPU is needed); a build that fails is an error. Without a compiler the installation is pure
Python.

GCRL_KERNELS_BUILD=1 makes a missing compiler an error, GCRL_KERNELS_BUILD=0 builds nothing.
GCRL_KERNELS_ARCHITECTURES="9.0a" compiles for those GPUs alone; +PTX adds code for newer ones.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "kernels"
WANTED = os.environ.get("GCRL_KERNELS_BUILD", "")
TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of PyTorch 2.11
ARCHITECTURES = os.environ.get("GCRL_KERNELS_ARCHITECTURES") or "8.0+PTX 9.0a"
INSTRUCTION_SETS = {  # by the ending of a file's name; built on x86-64 alone
    "_avx2": "-mavx2 -mfma",
    "_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
}


def find_compiler() -> str | None:
    """The C++ compiler: $CXX if that is set, else the first on PATH; None where there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)


def find_nvcc() -> str | None:
    """nvcc of CUDA 12 or newer: $CUDA_HOME's if that is set, else on PATH or in its usual place."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None:
        return None
    release = re.search(
        r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    return nvcc if release and int(release[1]) >= 12 else None


def find_ninja() -> list[str]:
    """The command that runs ninja: the program, or the Python package of that name."""
    program = shutil.which("ninja")
    if program is None and find_spec("ninja") is None:
        raise RuntimeError("building the kernels needs ninja, the program or the Python package")
    return [program] if program else [sys.executable, "-m", "ninja"]


def libraries() -> list[Extension]:
    """What is to be built here; the sources are every file of its language under csrc."""
    if WANTED == "0" or sys.platform != "linux":
        return []
    suffixes = {}
    if find_compiler() or WANTED == "1":
        suffixes["cpu"] = ".cpp"
        if find_nvcc():
            suffixes["cuda"] = ".cu"
    sources = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/*/*"))
    return [
        Extension(
            f"gcrl_kernels.libgcrl_kernels_{backend}",
            [path.as_posix() for path in sources if path.suffix == suffix and _runs_here(path)],
        )
        for backend, suffix in suffixes.items()
    ]


def _runs_here(source: Path) -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 or not source.stem.endswith(tuple(INSTRUCTION_SETS))


class BuildKernels(build_ext):
    """Writes one build.ninja with flags per file, runs ninja, and copies what comes out."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        compiler = find_compiler()
        if compiler is None:
            raise RuntimeError("GCRL_KERNELS_BUILD=1, and no C++ compiler was found (CXX, PATH)")
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise RuntimeError(
                "building the kernels needs PyTorch >= 2.11 in the environment of the build; "
                "GCRL_KERNELS_BUILD=0 installs without compiled kernels"
            ) from error
        BUILD.mkdir(parents=True, exist_ok=True)
        ninja = _ninja_file(self.extensions, compiler, include_paths(), library_paths())
        (BUILD / "build.ninja").write_text(ninja)
        subprocess.run([*find_ninja(), "-C", str(BUILD)], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(BUILD / _library_name(extension), target)


class Wheel(bdist_wheel):
    """Tags a wheel with libraries by platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def _library_name(extension: Extension) -> str:
    return extension.name.rpartition(".")[2] + ".so"


def _ninja_file(
    extensions: list[Extension], compiler: str, includes: list[str], libraries: list[str]
) -> str:
    """The rules for C++ and CUDA, then a statement per source file and one per library."""
    cxx = shlex.split(compiler)
    host = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
    link = [*(f"-L{path}" for path in libraries), "-lc10", "-ltorch", "-ltorch_cpu"]
    lines = [
        *_compile_rule("cpu", [*cxx, *_common_flags(includes), *host]),
        # What ptxas reports of each kernel stays beside the object.
        *_compile_rule(
            "cuda",
            cuda_command(compiler, includes),
            "> $out.log 2>&1 || failed=1; cat $out.log; test -z $$failed",
        ),
        *_link_rule("link_cpu", [*cxx, "-shared"], ["-Wl,-z,defs", *link]),
        # What only a PyTorch with CUDA defines is left open, and found through libtorch there.
        *_link_rule(
            "link_cuda",
            [*_nvcc(compiler), "-shared", "-cudart=static"],
            ["-Xlinker=--no-as-needed", *link],
        ),
    ]
    for extension in extensions:
        backend = extension.name.rpartition("_")[2]
        for source in extension.sources:
            flags = [f for end, f in INSTRUCTION_SETS.items() if Path(source).stem.endswith(end)]
            lines += [f"build {source}.o: {backend} ../../{source}", f"  flags = {' '.join(flags)}"]
        objects = " ".join(f"{source}.o" for source in extension.sources)
        lines.append(f"build {_library_name(extension)}: link_{backend} {objects}")
    return "\n".join(lines) + "\n"


def gencode(architecture: str) -> str:
    """What nvcc is told of an architecture that is written as PyTorch writes it."""
    parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
    if parts is None:
        raise ValueError(
            "GCRL_KERNELS_ARCHITECTURES: expected compute capabilities such as "
            f"'8.0+PTX 9.0a', got {architecture!r}"
        )
    number = parts[1] + parts[2]
    code = f"[sm_{number},compute_{number}]" if parts[3] else f"sm_{number}"
    return f"arch=compute_{number},code={code}"


def cuda_command(compiler: str, includes: list[str]) -> list[str]:
    """nvcc with what every CUDA file is compiled with."""
    host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
    architectures = [f"-gencode={gencode(name)}" for name in ARCHITECTURES.split()]
    report = f'-DGCRL_KERNELS_ARCHITECTURES="{ARCHITECTURES}"'
    device = ["-DUSE_CUDA", report, host, "-Xptxas=-v", "--expt-relaxed-constexpr", "--threads=2"]
    return [*_nvcc(compiler), *_common_flags(includes), *device, *architectures]


def _nvcc(compiler: str) -> list[str]:
    one_word = len(shlex.split(compiler)) == 1
    return [find_nvcc() or "nvcc", *(["-ccbin", compiler] if one_word else [])]


def _common_flags(includes: list[str]) -> list[str]:
    torch = [flag for path in includes for flag in ("-isystem", path)]
    return ["-std=c++20", "-O3", TORCH, f"-I{ROOT / 'csrc'}", *torch]


def _compile_rule(name: str, command: list[str], afterwards: str = "") -> list[str]:
    files = f"-MD -MF $out.d -c $in -o $out {afterwards}".rstrip()
    return [
        f"rule {name}",
        f"  command = {_escape(command)} $flags {files}",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def _link_rule(name: str, command: list[str], libraries: list[str]) -> list[str]:
    return [f"rule {name}", f"  command = {_escape(command)} $in -o $out {_escape(libraries)}"]


def _escape(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


if __name__ == "__main__":
    setup(
        ext_modules=libraries(),
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
