"""Axial attention in CUDA C++: on the CPU in an emulator, and on a GPU where there is one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from axial_attention_kernels import DTYPES, Attention, Kernels, Machine, check, exact_lse
from emulation import Emulator
from nvcc_report import resources
from test_axial_attention import images, plain
from torch import Tensor

from gcrl_kernels import backends


@pytest.fixture(scope="module")
def emulated(emulator: Emulator) -> Any:
    torch.ops.load_library(emulator.library("axial_attention.cpp", "-O1"))
    return torch.ops.gcrl_kernels_emulated


@pytest.fixture(params=["emulated", "gpu"])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "emulated":
        return Machine(request.getfixturevalue("emulated"), "cpu")
    reason = backends.unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    return Machine(torch.ops.gcrl_kernels_cuda, "cuda")


@pytest.fixture
def small_gpu(emulated: Any) -> Iterator[None]:
    """An emulated GPU with many multiprocessors and little shared memory."""
    emulated.set_device(3, 99 << 10)
    yield
    emulated.set_device(1, 227 << 10)


class TestKernels(Kernels):
    """In the emulator, which runs the threads in another order each time, and on a GPU."""


# Grid, axis, features, heads, layout and options: every kernel, rows that fill their tiles and rows
# that do not, several rows to a block and blocks with fewer, every layout.
CASES = [
    ((1,), 0, 16, 1, "contiguous", ""),
    ((5, 3), 0, 24, 3, "packed", "causal bias mask"),
    ((8,), 0, 128, 2, "turned", "bias"),
    ((3, 16), 1, 32, 4, "contiguous", "causal"),
    ((17, 2), 0, 64, 3, "sliced", "mask"),
    ((2, 17, 2), 1, 40, 1, "misaligned", "causal bias mask"),
    ((32, 3), 0, 64, 2, "packed", ""),
    ((32, 2), 0, 16, 6, "turned", "causal bias"),
    ((32,), 0, 96, 3, "packed", "bias mask"),
    ((40, 2), 0, 24, 2, "packed", "bias mask"),
    ((64,), 0, 64, 2, "packed", "causal"),
    ((64,), 0, 128, 1, "sliced", "bias mask"),
    ((2, 50), 1, 72, 1, "turned", "causal mask"),
    ((100,), 0, 64, 2, "packed", "causal bias"),
    ((128,), 0, 64, 1, "contiguous", "bias mask"),
    ((97,), 0, 32, 2, "misaligned", "causal"),
    ((128,), 0, 16, 2, "turned", "bias"),
    ((100,), 0, 128, 1, "packed", "causal bias mask"),
    ((130, 2), 0, 64, 1, "sliced", "mask"),
    ((257,), 0, 40, 1, "contiguous", "bias"),
    ((300,), 0, 24, 1, "misaligned", "causal mask"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid, axis, features, heads, layout, given_options", CASES)
def test_as_accurate_as_pytorch(
    machine, dtype, grid, axis, features, heads, layout, given_options
) -> None:
    inputs = images(*grid, batch=1, heads=heads, features=features)
    options: dict[str, Any] = {"axis": axis, "causal": "causal" in given_options}
    if "bias" in given_options:
        inputs.append(torch.randn(heads, grid[axis], grid[axis]))
    if "mask" in given_options:
        options["mask"] = torch.rand(1, *grid) > 0.4
    check(machine, inputs, dtype, layout, **options)


# Rows whole in a tile, in several, and streamed; loaded 16 bytes at a time, and number by number.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout, length, features",
    [("packed", 9, 16), ("misaligned", 40, 24), ("packed", 70, 40), ("misaligned", 70, 72)],
)
def test_what_a_key_that_is_left_out_holds_is_nowhere(
    machine, dtype, layout, length, features
) -> None:
    """NaN and infinities there give the very results that zeros give; it is still a query."""
    q, k, v = images(length, batch=2, heads=1, features=features)
    mask = torch.rand(2, length) > 0.3
    mask[1] = False
    clean = [q, *(t.masked_fill(~mask[..., None, None], 0.0) for t in (k, v))]
    foul = [q, *(t.clone() for t in clean[1:])]
    for number, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        left_out = ~mask & (torch.arange(length) % 3 == number)
        foul[1][left_out], foul[2][left_out] = value, -value
    bias, grad = torch.randn(1, length, length), torch.randn(2, length, 1, features).to(dtype)
    results = []
    for tensors in (clean, foul):
        leaves = [*(t.to(dtype).requires_grad_() for t in tensors), bias.clone().requires_grad_()]
        ours = Attention(*machine, layout, axis=0, mask=mask)
        out = ours(*leaves)
        results.append([out, ours.lse, *torch.autograd.grad(out, leaves, grad)])
    names = ("out", "lse", "dq", "dk", "dv", "dbias")
    for name, expected, actual in zip(names, *results, strict=True):
        assert not expected.isnan().any(), name
        assert torch.equal(actual, expected), name
    expected = plain(*(t.double() for t in clean), bias.double(), axis=0, mask=mask)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(results[1][0].double(), expected, rtol=tolerance, atol=tolerance)


# Rows whole in a tile of either size, in several, and streamed.
ROWS = [(16, 16), (40, 24), (70, 40), (70, 72)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-2.45e5, 1e6, -1e6, -1e9])
@pytest.mark.parametrize("length, features", ROWS)
def test_what_is_added_to_all_scores_changes_nothing(
    machine, dtype, length, features, offset
) -> None:
    """Scores that differ by multiples of the offset's last place: float32 holds each exactly."""
    q = torch.zeros(1, length, 1, features)
    v, grad = torch.randn_like(q).to(dtype), torch.randn_like(q).to(dtype)
    last_place = 2.0 ** (math.floor(math.log2(abs(offset))) - 23)
    steps = torch.randint(-60, 60, (1, length, length)) // 4
    bias = steps * last_place
    leaves = [t.requires_grad_() for t in (q.double(), q.double(), v.double(), bias.double())]
    exact = plain(*leaves, axis=0)
    expected = [exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())]
    ours = Attention(*machine, axis=0)
    leaves = [t.requires_grad_() for t in (q.to(dtype), q.to(dtype), v, bias + offset)]
    out = ours(*leaves)
    actual = [out, *torch.autograd.grad(out, leaves, grad)]
    for value, wanted in zip(actual, expected, strict=True):
        tolerance = 8 * torch.finfo(dtype).eps * float(wanted.abs().max().clamp_min(1))
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=tolerance)
    assert ours.lse is not None
    lse = offset + exact_lse(q.double(), q.double(), bias.double(), axis=0)
    assert torch.equal(ours.lse[0], lse.float())
    torch.testing.assert_close(ours.lse.double().sum(0), lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_bias", [True, False])
@pytest.mark.parametrize("length, features", ROWS)
def test_large_scores_that_are_all_the_same(machine, dtype, by_bias, length, features) -> None:
    """However they are rounded."""
    q, bias = torch.zeros(1, length, 1, features), torch.full((1, length, length), -2.45e5)
    scale = None if by_bias else 0.3
    inputs = [q, q, torch.ones_like(q), bias] if by_bias else [q + 999, q + 999, torch.ones_like(q)]
    leaves = [t.to(dtype).requires_grad_() for t in inputs[:3]]
    out = Attention(*machine, axis=0, scale=scale)(*leaves, *inputs[3:])
    dv = torch.autograd.grad(out.sum(), leaves[2])[0]
    assert torch.equal(out, torch.ones_like(out))
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(dv, torch.ones_like(dv), rtol=tolerance, atol=0)


@pytest.mark.parametrize("length", [9, 50, 130])
def test_any_byte_of_a_mask_but_zero_is_true(machine, length) -> None:
    tensors = images(length, batch=1, heads=1, features=16)
    bytes_ = (torch.arange(length) % 4 * 85).to(torch.uint8)[None]  # 0, 85, 170, 255
    results = []
    for mask in (bytes_.view(torch.bool), bytes_ > 0):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = Attention(*machine, axis=0, mask=mask)(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected = plain(*(t.double() for t in tensors), axis=0, mask=bytes_ > 0)
    torch.testing.assert_close(results[0][0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length, features", [(32, 64), (64, 128), (100, 64), (130, 128)])
def test_little_shared_memory(emulated, small_gpu, dtype, length, features) -> None:
    inputs = images(length, 2, batch=2, heads=1, features=features)
    inputs.append(torch.randn(1, length, length))
    check(Machine(emulated, "cpu"), inputs, dtype, "packed", axis=0)


@pytest.mark.parametrize("operator", ["axial_attention", "axial_attention_backward"])
@pytest.mark.parametrize("length", [16, 300, 1024])
def test_too_little_shared_memory_is_an_error(emulated, small_gpu, length, operator) -> None:
    q, lse, options = torch.zeros(1, length, 1, 128), torch.zeros(2, 1, length, 1), (0, False, 1.0)
    arguments = {
        "axial_attention": (q, q, q, None, None, *options, q.clone(), lse),
        "axial_attention_backward": (
            q, q, q, q, q, lse, None, None, *options, q.clone(), q.clone(), q.clone(), None
        ),
    }  # fmt: skip
    emulated.set_device(1, 32 << 10)
    message = "q: expected rows that take up to 32768 bytes of shared memory, as much as this GPU "
    with pytest.raises(RuntimeError, match=message):
        getattr(emulated, operator)(*arguments[operator])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"q": (1025, 16)}, "q: expected rows of up to 1024 positions, got 1025"),
        ({"q": (5, 20)}, "q: expected 16 to 128 features a head in multiples of 8, got 20"),
        ({"q": (5, 8)}, "q: expected 16 to 128 features a head in multiples of 8, got 8"),
        ({"k": (5, 24)}, "k: expected size 16 in dimension 3, got 24"),
        ({"dtype": torch.float64}, "q: expected float32, float16 or bfloat16"),
        ({"axis": 1}, "axis: expected one of the grid, got 1"),
        ({"lse": (1, 5, 2)}, "lse: expected float32 [2, B, *grid, heads]"),
        ({"lse": (2, 1, 5, 3)}, "lse: expected size 2 in dimension 3, got 3"),
    ],
)
def test_what_is_refused(machine, changed, message) -> None:
    dtype = changed.get("dtype", torch.float32)

    def tensor(name: str) -> Tensor:
        length, features = changed.get(name, changed.get("q", (5, 16)))
        return torch.zeros(1, length, 2, features, dtype=dtype, device=machine.device)

    q = tensor("q")
    lse = torch.zeros(changed.get("lse", (2, *q.shape[:-1])), device=machine.device)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        machine.library.axial_attention(
            q, tensor("k"), tensor("v"), None, None, changed.get("axis", 0), False, 1.0,
            torch.empty_like(q), lse,
        )  # fmt: skip


SANITIZED = """
import sys, torch
import missing
missing.stand_in_for_hypothesis()
import test_axial_attention_cuda as tests
torch.ops.load_library(sys.argv[1])
machine = tests.Machine(torch.ops.gcrl_kernels_emulated, "cpu")
for number, case in enumerate(tests.CASES):
    grid, axis, features, *_ = case
    if grid[axis] * features < 7000:
        tests.test_as_accurate_as_pytorch(machine, tests.DTYPES[number % 3], *case)
print("done")
"""


def test_within_its_memory(emulator: Emulator) -> None:
    """A sample under the sanitizers of addresses and of undefined behaviour."""
    emulator.run_sanitized(SANITIZED, "axial_attention.cpp")


def test_compiles_without_spills_or_stack(
    root: Path, setup_script: ModuleType, tmp_path: Path
) -> None:
    """By the compiler's own report of each kernel for each architecture."""
    compiled = resources(root, setup_script, tmp_path, "axial_attention/cuda.cu")
    for kernel in ("axial_forward", "axial_backward", "axial_backward_streamed", "sum_slots"):
        assert any(kernel in each.kernel for each in compiled)
    assert [each for each in compiled if each.stack or each.spill_stores or each.spill_loads] == []
