"""Which backends exist, and that one asked for by name never gives way to another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from limits import HANG

from gcrl_kernels import backends
from gcrl_kernels.backends import BackendUnavailableError, choose, unavailable

ANY = torch.empty(2)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Makes a backend missing for a given reason."""

    def remove(backend: str, reason: str) -> None:
        monkeypatch.setitem(backends._MISSING, backend, reason)

    return remove


def test_cpu_library_is_built_wherever_there_is_a_compiler(setup_script: ModuleType) -> None:
    if setup_script.find_compiler() is None:
        pytest.skip("no C++ compiler here")
    assert unavailable("cpu") is None
    assert backends.is_loaded("cpu")
    assert torch.ops.gcrl_kernels_cpu.quantize_colors.default is not None


def test_cuda_library_registers_wherever_there_is_nvcc(setup_script: ModuleType) -> None:
    if setup_script.find_compiler() is None or setup_script.find_nvcc() is None:
        pytest.skip("no nvcc here")
    assert backends.is_loaded("cuda"), unavailable("cuda")
    operator = "gcrl_kernels_cuda::quantize_colors"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")


@pytest.mark.parametrize("choice", backends.CHOICES, ids=lambda c: f"{c.operator}-{c.device}")
def test_a_choice_on_the_cpu_names_results_that_show_it(choice: backends.Choice) -> None:
    """The first choice is the fastest of ours, wherever its operator was measured."""
    if choice.results is None:
        assert choice.device == "cuda" or len(choice.backends) == 1, "not measured"
        return
    results = json.loads((RESULTS / choice.results).read_text())
    contests = [c for c in results["contests"] if c["operation"] == choice.operator]
    assert contests
    best, *others = choice.backends
    faster = []
    for contest in contests:
        times = {name: c["median"] for name, c in contest["contenders"].items() if "median" in c}
        ours = [times[f"gcrl_kernels {name}"] for name in others]
        faster.append(times[f"gcrl_kernels {best}"] <= min(ours))
    assert sum(faster) > len(faster) / 2


def test_reference_is_always_available() -> None:
    assert unavailable("reference") is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="a PyTorch with CUDA")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_build_of_pytorch_without_cuda_is_the_reason(backend: str) -> None:
    if backend in backends._MISSING:
        pytest.skip("missing for another reason")
    assert unavailable(backend) == f"this build of PyTorch ({torch.__version__}) has no CUDA"


@pytest.mark.parametrize("call", [unavailable, lambda name: choose("nt_xent", name, ANY)])
def test_unknown_name(call) -> None:
    expected = "backend: expected None or one of reference, cpu, triton, cuda, got 'gpu'"
    with pytest.raises(ValueError, match=expected):
        call("gpu")


def test_none_takes_the_best_that_serves_the_device(without) -> None:
    best = "reference" if unavailable("cpu") else "cpu"
    assert choose("quantize_colors", None, ANY) == best
    assert choose("quantize_colors", None, ANY.to("meta")) == "reference"
    assert choose("linear_color_cross_entropy", None, ANY) == best
    without("cpu", "it is gone")
    assert choose("quantize_colors", None, ANY) == "reference"


def test_a_name_is_honoured() -> None:
    assert choose("quantize_colors", "reference", ANY) == "reference"


def test_a_missing_backend_raises_with_its_reason(without) -> None:
    without("cpu", "it is gone")
    expected = "backend 'cpu' cannot run quantize_colors: it is gone"
    with pytest.raises(BackendUnavailableError, match=expected):
        choose("quantize_colors", "cpu", ANY)


def test_an_operator_that_the_backend_lacks_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.IMPLEMENTED, "nt_xent", ("cpu", "reference"))
    expected = "backend 'triton' cannot run nt_xent: only cpu, reference can"
    with pytest.raises(BackendUnavailableError, match=expected):
        choose("nt_xent", "triton", ANY)


def test_another_device_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(backends._MISSING, "cuda", raising=False)
    expected = (
        "backend 'cuda' cannot run quantize_colors: it serves 'cuda' tensors, got one on 'cpu'"
    )
    with pytest.raises(BackendUnavailableError, match=expected):
        choose("quantize_colors", "cuda", ANY)


@pytest.mark.parametrize("requested", [None, "reference"])
def test_choice_is_traced_without_a_break(requested: str | None) -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return x + len(choose("quantize_colors", requested, x))

    compiled = torch.compile(branch, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ANY.zero_()), branch(ANY.zero_()))


def test_a_library_that_does_not_load_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "libgcrl_kernels_cpu.so"
    monkeypatch.setitem(backends.LIBRARIES, "cpu", broken)
    reason = backends._load("cpu")
    assert reason is not None
    assert "was not built: it takes a C++ compiler" in reason
    broken.write_bytes(b"no library")
    reason = backends._load("cpu")
    assert reason is not None
    assert reason.startswith("libgcrl_kernels_cpu.so cannot be loaded: ")
    assert "file too short" in reason or "invalid ELF header" in reason


def test_levels_hold_until_the_end_and_unknown_ones_raise() -> None:
    levels = backends.cpu_levels()
    with pytest.raises(BackendUnavailableError, match="level: expected one of .*, got 'mmx'"):
        backends.use_cpu_level("mmx").__enter__()
    if not levels:
        pytest.skip("no compiled CPU kernels here")
    assert levels[-1] == "portable"
    with pytest.raises(RuntimeError, match="level: expected one of .*portable, got mmx"):
        torch.ops.gcrl_kernels_cpu.set_cpu_level("mmx")


NO_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, gcrl_kernels, gcrl_kernels.modules
from gcrl_kernels.backends import unavailable
q = torch.rand(1, 2, 3, 1, 4)
assert gcrl_kernels.axial_attention(q, q, q, 0).shape == q.shape
print(unavailable("triton"))
"""


def test_without_triton_everything_else_works(root: Path) -> None:
    command = [sys.executable, "-c", NO_TRITON]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the package triton is not installed"


def test_report_names_versions_libraries_and_reasons(without) -> None:
    from gcrl_kernels.__main__ import report

    without("triton", "it is gone")
    text = report()
    for fact in (torch.__version__, "NumPy", "Triton", "GPU", "instruction sets", "CPU threads"):
        assert fact in text
    for backend in backends.BACKENDS:
        assert f"backend {backend}" in text
    for library in backends.LIBRARIES.values():
        assert str(library) in text
    assert "missing: it is gone" in text


def test_report_is_a_command(root: Path) -> None:
    command = [sys.executable, "-m", "gcrl_kernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=HANG
    )
    assert "backend reference  available" in done.stdout
