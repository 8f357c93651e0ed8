"""The source distribution, what installing from it builds, and what happens without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from limits import HANG

LEVELS = ("portable", "avx2", "avx512")
NO_COMPILER = {"CXX": "/nonexistent/c++"}
QUANTIZE = """
import torch, gcrl_kernels
from gcrl_kernels.backends import choose
pixels, palette = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [0, 0, 0]])
assert gcrl_kernels.quantize_colors(pixels, palette).tolist() == [1, 1]
print(gcrl_kernels.__file__, choose("quantize_colors", None, pixels))
"""


def run(
    *command: str | Path, folder: Path, succeeds: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, built from a copy of what the repository holds."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "repository"
    ignored = (root / ".gitignore").read_text().split()
    unwanted = shutil.ignore_patterns(".git", *(name.rstrip("/") for name in ignored))
    shutil.copytree(root, copy, ignore=unwanted)
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder=copy)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


FOLDERS = (".ci", "benchmarks", "csrc", "docs", "gcrl_kernels", "python/gcrl", "tests")
FILES = (
    ".clang-format", ".gitignore", ".pre-commit-config.yaml", "CITATION.cff", "CONTRIBUTING.md",
    "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml",
    "setup.py",
)  # fmt: skip


def test_source_distribution_is_complete(source: Path) -> None:
    repository = source.parent / "repository"
    for folder in FOLDERS:
        files = [path for path in (repository / folder).rglob("*") if path.is_file()]
        names = [path.relative_to(repository) for path in files]
        assert names, folder
        assert [name for name in names if not (source / name).exists()] == []
    assert [name for name in FILES if not (source / name).exists()] == []
    assert not list(source.rglob("*.so"))


KEPT = {"color_cells", "quantizer", "cpu_level", *(f"nearest_color_{level}" for level in LEVELS)}


@pytest.fixture
def small(source: Path, tmp_path: Path) -> Path:
    """The source distribution with the C++ that quantises colours alone, and next to no CUDA."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
    for path in copy.glob("csrc/*/*"):
        if path.suffix in (".cpp", ".cu") and path.stem not in KEPT:
            path.unlink()
    (copy / "csrc" / "common" / "nothing.cu").write_text("__global__ void nothing() {}\n")
    return copy


def test_installs_compiled_from_the_source_distribution(
    small: Path, tmp_path: Path, setup_script: ModuleType
) -> None:
    if setup_script.find_compiler() is None:
        pytest.skip("no C++ compiler here")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--target")
    target = tmp_path / "installed"
    run("-m", "pip", "install", *flags, target, small, folder=tmp_path, GCRL_KERNELS_BUILD="1")
    done = run("-c", QUANTIZE, folder=tmp_path, PYTHONPATH=str(target))
    assert done.stdout.split() == [str(target / "gcrl_kernels" / "__init__.py"), "cpu"]
    libraries = {path.name for path in (target / "gcrl_kernels").glob("*.so")}
    expected = {"libgcrl_kernels_cpu.so"}
    expected |= {"libgcrl_kernels_cuda.so"} if setup_script.find_nvcc() else set()
    assert libraries == expected
    assert (target / "gcrl" / "cli.py").exists()
    (metadata,) = target.glob("gcrl_kernels-*.dist-info/WHEEL")
    assert "Tag: py3-none-linux" in metadata.read_text()


def test_without_a_compiler_installs_pure_python(source: Path, tmp_path: Path) -> None:
    flags = ("--wheel", "--no-isolation", "--outdir")
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
    run("-m", "build", *flags, tmp_path, folder=copy, GCRL_KERNELS_BUILD="", **NO_COMPILER)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    done = run("-c", QUANTIZE, folder=tmp_path, PYTHONPATH=str(target))
    assert done.stdout.split() == [str(target / "gcrl_kernels" / "__init__.py"), "reference"]
    done = run("-m", "gcrl_kernels", folder=tmp_path, PYTHONPATH=str(target))
    assert "backend cpu        missing: libgcrl_kernels_cpu.so was not built" in done.stdout


def test_a_build_that_is_required_fails_without_a_compiler(source: Path) -> None:
    build = ("setup.py", "build_ext")
    done = run(*build, folder=source, succeeds=False, GCRL_KERNELS_BUILD="1", **NO_COMPILER)
    assert "GCRL_KERNELS_BUILD=1, and no C++ compiler was found" in done.stderr


def test_a_compiler_that_fails_is_an_error(small: Path) -> None:
    run("setup.py", "build_ext", folder=small, succeeds=False, GCRL_KERNELS_BUILD="", CXX="false")


def test_a_build_without_pytorch_says_so(source: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    variables = {"PYTHONPATH": str(tmp_path), "GCRL_KERNELS_BUILD": "1", "CXX": "true"}
    done = run("setup.py", "build_ext", folder=source, succeeds=False, **variables)
    assert "building the kernels needs PyTorch >= 2.11" in done.stderr


def test_ninja_is_found_beside_python(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A virtual environment's programs are not on PATH unless it is activated."""
    monkeypatch.setenv("PATH", str(tmp_path))
    subprocess.run([*setup_script.find_ninja(), "--version"], check=True, capture_output=True)
    monkeypatch.setattr(setup_script, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="building the kernels needs ninja"):
        setup_script.find_ninja()


@pytest.mark.parametrize(("wanted", "count"), [("0", 0), ("", 0), ("1", 1)])
def test_what_is_built_without_a_compiler(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, wanted: str, count: int
) -> None:
    monkeypatch.setattr(setup_script, "WANTED", wanted)
    monkeypatch.setattr(setup_script, "find_compiler", lambda: None)
    monkeypatch.setattr(setup_script, "find_nvcc", lambda: None)
    assert len(setup_script.libraries()) == count


def test_an_instruction_set_is_left_out_on_other_machines(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_script, "WANTED", "1")
    monkeypatch.setattr(setup_script.platform, "machine", lambda: "aarch64")
    sources = setup_script.libraries()[0].sources
    assert "csrc/color_cross_entropy/nearest_color_portable.cpp" in sources
    assert not [name for name in sources if "avx" in name]


def test_architectures_are_written_as_pytorch_writes_them(setup_script: ModuleType) -> None:
    assert setup_script.gencode("9.0a") == "arch=compute_90a,code=sm_90a"
    assert setup_script.gencode("8.0+PTX") == "arch=compute_80,code=[sm_80,compute_80]"
    assert setup_script.gencode("12.0") == "arch=compute_120,code=sm_120"
    with pytest.raises(ValueError, match=r"GCRL_KERNELS_ARCHITECTURES: expected .*, got 'sm_90'"):
        setup_script.gencode("sm_90")
