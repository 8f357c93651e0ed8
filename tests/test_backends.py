"""Which backends exist, and that one asked for by name never gives way to another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from limits import HANG

from gcrl_kernels import backends, capability
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


# Compute capability, and which of cuda in the usual build, cuda for Hopper alone, and triton serve.
CARDS = {
    "V100": ((7, 0), False, False, False),
    "T4": ((7, 5), False, False, False),
    "A100": ((8, 0), True, False, True),
    "L4": ((8, 9), True, False, True),
    "H100": ((9, 0), True, True, True),
    "B200": ((10, 0), True, False, True),
    "RTX 5090": ((12, 0), True, False, True),
}


@pytest.fixture
def machine_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A machine with GPUs of some compute capabilities, and a library compiled for some."""

    def install(*cards: tuple[int, int], compiled: str) -> SimpleNamespace:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: cards[d.index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: f"card {d.index}")
        library = SimpleNamespace(architectures=lambda: compiled)
        monkeypatch.setattr(torch.ops, "gcrl_kernels_cuda", library)
        for backend in ("cuda", "triton"):
            monkeypatch.delitem(backends._MISSING, backend, raising=False)
        forget()
        return SimpleNamespace(device=torch.device("cuda", len(cards) - 1))

    def forget() -> None:
        backends.architectures.cache_clear()
        capability.of_card.cache_clear()

    yield install
    forget()


@pytest.mark.parametrize(("compiled", "column"), [("8.0+PTX 9.0a", 1), ("9.0a", 2)])
@pytest.mark.parametrize("name", CARDS)
def test_none_takes_what_runs_on_the_card(machine_with, name, compiled, column) -> None:
    card, by_triton = CARDS[name][0], CARDS[name][3]
    tensor = machine_with(card, compiled=compiled)
    by_cuda = CARDS[name][column]
    expected = "cuda" if by_cuda else "triton" if by_triton else "reference"
    assert choose("nt_xent", None, tensor) == expected
    assert (unavailable("cuda") is None) == by_cuda
    assert (unavailable("triton") is None) == by_triton


def test_a_name_that_the_card_does_not_run_raises(machine_with) -> None:
    tensor = machine_with((7, 5), compiled="8.0+PTX 9.0a")
    found = "this GPU has compute capability 7.5, and "
    reasons = {"cuda": "it was compiled for 8.0+PTX 9.0a", "triton": "its kernels need 8.0"}
    for backend, reason in reasons.items():
        expected = f"backend '{backend}' cannot run nt_xent: {found}{reason}"
        with pytest.raises(BackendUnavailableError, match=re.escape(expected)):
            choose("nt_xent", backend, tensor)
        assert unavailable(backend) == found + reason


def test_each_card_is_asked(machine_with) -> None:
    tensor = machine_with((9, 0), (7, 5), compiled="9.0a")
    assert choose("nt_xent", None, tensor) == "reference"
    tensor.device = torch.device("cuda", 0)
    assert choose("nt_xent", None, tensor) == "cuda"
    assert unavailable("cuda") is None


@pytest.mark.parametrize(
    ("compiled", "runs"),
    [
        ("8.6", "8.6 8.9"),
        ("8.0", "8.0 8.6 8.9"),
        ("9.0+PTX", "9.0 10.0 10.3 12.0"),
        ("9.0a+PTX", "9.0"),
        ("8.0a", "8.0"),
        ("10.0f", "10.0 10.3"),
        ("10.3f", "10.3"),
        ("7.0 12.0", "7.0 7.5 12.0"),
    ],
)
def test_what_code_runs_on(compiled: str, runs: str) -> None:
    cards = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    found = [card for card in cards if capability.runs_on(card, compiled)]
    assert " ".join(map(capability.as_text, found)) == runs


def test_the_card_is_asked_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "of_card", lambda device: (7, 5))
    monkeypatch.delitem(backends._MISSING, "triton", raising=False)
    device = torch.device("cuda", 0)

    def branch(x: torch.Tensor) -> torch.Tensor:
        return x + len(backends._obstacle("triton", device) or "")

    compiled = torch.compile(branch, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ANY.zero_()), branch(ANY.zero_()))
    assert compiled(ANY.zero_())[0] > 0


def test_the_library_says_what_it_was_compiled_for(setup_script: ModuleType) -> None:
    if not backends.is_loaded("cuda"):
        pytest.skip("no compiled CUDA kernels here")
    for architecture in backends.architectures("cuda").split():
        assert setup_script.gencode(architecture)


def test_report_names_cards_and_architectures(machine_with) -> None:
    from gcrl_kernels.__main__ import report

    machine_with((7, 5), compiled="9.0a")
    text = report()
    assert "card 0 (compute capability 7.5)" in text
    assert "loaded, compiled for 9.0a" in text
    expected = "missing: this GPU has compute capability 7.5, and it was compiled for 9.0a"
    assert expected in text


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
