"""The compiled CPU kernels under the sanitizers of addresses and of undefined behaviour."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_axial_attention
import test_color_cross_entropy
import test_contrastive
import torch
from comparison import Function, values_and_gradients
from emulation import SANITIZERS, Emulator
from limits import HANG
from torch import Tensor

from gcrl_kernels import (
    axial_attention,
    color_cross_entropy,
    linear_color_cross_entropy,
    nt_xent,
)

FILES = (
    "test_axial_attention_cpu.py", "test_color_cross_entropy_cpu.py", "test_contrastive_cpu.py",
    "test_quantize_native.py",
)  # fmt: skip
# What is slow there, for its size; and the memory that is used, which the sanitizers add to.
LEFT_OUT = ("many_", "several_chunks", "memory_beyond")
# The kernels that are imported have to be those of the library.
PROGRAM = """
import sys, pytest
from gcrl_kernels.backends import LIBRARIES, cpu_levels
assert str(LIBRARIES["cpu"]) == sys.argv[1]
assert cpu_levels()
sys.exit(pytest.main(sys.argv[2:]))
"""


def odd_mask(*shape: int) -> Tensor:
    """Of every byte: all but 0 are True, as PyTorch reads them."""
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.bool)


@pytest.mark.usefixtures("every_cpu_level")
def test_any_byte_of_a_mask_is_a_truth_value() -> None:
    q = torch.randn(2, 5, 6, 2, 8)
    mask = odd_mask(2, 5, 6)
    mask[0, 0] = False
    tokens, counts = torch.randint(0, 7, (600,)), odd_mask(600)
    logits, hidden, weight = torch.randn(600, 7), torch.randn(600, 6), torch.randn(7, 6)

    def results(mask: Tensor, counts: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (q, logits, hidden, weight)]
        values = [
            axial_attention(*leaves[:1] * 3, 1, mask=mask, backend="cpu").square().sum(),
            color_cross_entropy(leaves[1], tokens, mask=counts, backend="cpu"),
            linear_color_cross_entropy(*leaves[2:], tokens, mask=counts, backend="cpu"),
        ]
        return [*values, *torch.autograd.grad(torch.stack(values).sum(), leaves)]

    # A comparison, unlike a copy, writes bytes of 0 and 1.
    clean = results(mask.view(torch.uint8) != 0, counts.view(torch.uint8) != 0)
    for odd, expected in zip(results(mask, counts), clean, strict=True):
        assert torch.equal(odd, expected)


@pytest.mark.usefixtures("every_cpu_level")
@pytest.mark.parametrize("size", [2.0**14, 2.0**27, 2.0**60])
def test_values_of_any_size(size: float) -> None:
    # Whole numbers times powers of two: products are exact, and scores that tie do so anywhere.
    q, k, v = (torch.randint(-9, 10, (2, 5, 6, 2, 8)).float() for _ in range(3))
    k, logits = k * size, torch.randint(-9, 10, (40, 7)) * size
    tokens, z = torch.randint(0, 7, (40,)), torch.randn(40, 6)
    attend, contrast = {"axis": 1, "scale": 0.25}, {"temperature": 1 / size}
    compared: list[tuple[Function, Function, list[Tensor], float]] = [
        (
            lambda *qkv: axial_attention(*qkv, **attend, backend="cpu"),
            lambda *qkv: test_axial_attention.plain(*qkv, **attend),
            [q, k, v], 1,
        ),
        (
            lambda logits: color_cross_entropy(logits, tokens, backend="cpu"),
            lambda logits: test_color_cross_entropy.plain(logits, tokens),
            [logits], size,
        ),
        (
            lambda *views: nt_xent(*views, **contrast, backend="cpu"),
            lambda *views: test_contrastive.plain(*views, **contrast),
            [z, z.flip(0)], size,
        ),
    ]  # fmt: skip
    for ours, plain, inputs, scale in compared:
        exact, *_ = values_and_gradients(plain, inputs, torch.float64)
        actual, *gradients = values_and_gradients(ours, inputs, torch.float32)
        assert (actual.double() - exact).abs().max() <= 1e-5 * max(float(exact.abs().max()), scale)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("every_cpu_level")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows_where_it_does_in_the_reference(value: float) -> None:
    rows = torch.randn(2, 9, 2, 8)
    logits, z = torch.randn(40, 7), torch.randn(40, 6)
    for tensor in (rows, logits, z):
        tensor[(1,) * tensor.dim()] = value
    tokens = torch.full((40,), 1)

    def results(backend: str) -> list[Tensor]:
        return [
            axial_attention(rows, rows, rows, 0, backend=backend),
            color_cross_entropy(logits, tokens, reduction="none", backend=backend),
            nt_xent(z, z.flip(0), reduction="none", backend=backend),
        ]

    for ours, expected in zip(results("cpu"), results("reference"), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.fixture
def library(emulator: Emulator, root: Path, tmp_path: Path) -> Path:
    """The library of every C++ source, sanitized, in a copy of the package."""
    if not emulator.sanitizes():
        pytest.skip("the compiler has no address sanitizer here")
    for folder in ("csrc", "gcrl_kernels", "python"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    script = (root / "setup.py").read_text()
    assert '"-O3"' in script
    (tmp_path / "setup.py").write_text(script.replace('"-O3"', '"-O1"'))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    environment = {
        **os.environ,
        "CXX": shlex.join([*emulator.compiler, *SANITIZERS[:1]]),  # which goes on after a fault
        "CUDA_HOME": "/nonexistent",
        "GCRL_KERNELS_BUILD": "1",
    }
    words = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / "gcrl_kernels" / "libgcrl_kernels_cpu.so"


def test_they_find_nothing(emulator: Emulator, root: Path, tmp_path: Path, library: Path) -> None:
    tests = [str(root / "tests" / name) for name in (*FILES, Path(__file__).name)]
    chosen = "not (" + " or ".join((*LEFT_OUT, "find_nothing")) + ")"
    flags = ["-qs", "-p", "no:cacheprovider", "-k", chosen]  # -s: their reports go to stderr
    words = [sys.executable, "-c", PROGRAM, library, *flags]
    environment = emulator.sanitized_environment(tmp_path, root / "tests")
    done = subprocess.run(
        [*words, *tests], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=HANG,
    )  # fmt: skip
    reports = re.findall(r".*: runtime error: .*|.*ERROR: AddressSanitizer.*", done.stderr)
    assert reports == [], done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
