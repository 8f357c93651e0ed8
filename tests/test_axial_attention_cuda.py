"""Axial attention in CUDA C++: on the CPU in an emulator, and on a GPU where there is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from axial_attention_kernels import LAYOUTS, Attention
from comparison import assert_as_accurate
from emulation import Emulator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvcc_report import resources
from test_axial_attention import images, plain
from torch import Tensor

from gcrl_kernels import backends

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Machine(NamedTuple):
    """Where the kernels run: their operators and the device of their tensors."""

    library: Any
    device: str


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


def exact_lse(
    q: Tensor, k: Tensor, bias: Tensor | None = None, *, axis, causal=False, scale=None, mask=None
) -> Tensor:
    """[B, *grid, heads] in the inputs' dtype."""
    q, k = (tensor.movedim(axis + 1, -2) for tensor in (q, k))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        keys = mask.movedim(axis + 1, -1)[..., None, None, :]
        scores = scores.masked_fill(~keys, -torch.inf)
    return scores.logsumexp(-1).movedim(-1, axis + 1)


def check(
    machine: Machine, inputs: list[Tensor], dtype: torch.dtype, layout: str, **options: Any
) -> None:
    """Output, gradients and lse are as accurate as PyTorch's; lse in float32 always."""
    ours = Attention(*machine, layout, **options)
    assert_as_accurate(ours, lambda *t: plain(*t, **options), inputs, dtype)
    q, k, _, *bias = (tensor.to(dtype) for tensor in inputs)
    expected = exact_lse(*(t.double() for t in (q, k, *bias)), **options)
    plainly = exact_lse(*(t.float() for t in (q, k, *bias)), **options)
    assert ours.lse is not None
    assert torch.equal(ours.lse == -torch.inf, expected == -torch.inf)
    known = expected.isfinite()
    error = (ours.lse - expected)[known].abs()
    allowed = 2 * (plainly - expected)[known].abs().max() if known.any() else 0.0
    assert (error <= allowed + 2e-7 * expected[known].abs().max() + 1e-6).all()


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


def test_the_longest_row(machine) -> None:
    check(machine, images(1024, batch=1, heads=1, features=16), torch.bfloat16, "packed", axis=0)


@given(
    length=st.integers(1, 140),
    features=st.integers(2, 16),
    heads=st.integers(1, 5),
    lines=st.integers(1, 3),
    axis=st.integers(0, 1),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    causal=st.booleans(),
    biased=st.booleans(),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.3, -0.5]),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_row(
    machine, length, features, heads, lines, axis, dtype, layout, causal, biased, masked, scale
) -> None:
    grid = (length, lines) if axis == 0 else (lines, length)
    inputs = images(*grid, batch=1, heads=heads, features=8 * features)
    if biased:
        inputs.append(torch.randn(heads, length, length))
    options: dict[str, Any] = {"axis": axis, "causal": causal, "scale": scale}
    if masked:
        options["mask"] = torch.rand(1, *grid) > 0.4
    check(machine, inputs, dtype, layout, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length, features", [(32, 64), (64, 128), (100, 64), (130, 128)])
def test_little_shared_memory(emulated, small_gpu, dtype, length, features) -> None:
    inputs = images(length, 2, batch=2, heads=1, features=features)
    inputs.append(torch.randn(1, length, length))
    check(Machine(emulated, "cpu"), inputs, dtype, "packed", axis=0)


@pytest.mark.parametrize("length", [9, 40, 100, 140])
def test_the_gradient_of_a_bias_is_the_sum_over_many_lines(machine, length) -> None:
    """More lines than the blocks that add to it in turn."""
    inputs = images(length, 7, batch=3, heads=2, features=16)
    inputs.append(torch.randn(2, length, length))
    check(machine, inputs, torch.float32, "contiguous", axis=0, causal=True)


@pytest.mark.parametrize("length", [32, 100, 140])
def test_repeats_bit_for_bit(machine, length) -> None:
    """The emulator runs the threads in another order each time."""
    inputs = [t.bfloat16() for t in images(length, 3, batch=2, heads=3, features=24)]
    inputs.append(torch.randn(3, length, length))
    ours = Attention(*machine, axis=0, causal=True)
    results = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = ours(*leaves)
        results.append([out, ours.lse, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [6, 40, 70])
def test_scores_out_of_range_give_what_softmax_gives(machine, dtype, length) -> None:
    q, k, v = images(length, batch=1, heads=1, features=16)
    q[0, 2], q[0, 3] = torch.inf, torch.nan
    out = Attention(*machine, axis=0)(*(tensor.to(dtype) for tensor in (q, k, v)))
    expected = plain(*(tensor.to(dtype).float() for tensor in (q, k, v)), axis=0)
    assert torch.equal(out.isnan(), expected.isnan())
    known = ~expected.isnan()
    tolerance = 4 * torch.finfo(dtype).eps
    assert ((out.float() - expected)[known].abs() <= tolerance * expected[known].abs().max()).all()


@pytest.mark.parametrize("length", [6, 70])
def test_a_key_that_is_left_out_may_hold_nan(machine, length) -> None:
    q, k, v = images(length, batch=1, heads=1, features=16)
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[0, 3] = False
    expected = plain(q, k, v, axis=0, mask=mask)
    k[0, 3] = torch.nan
    out = Attention(*machine, axis=0, mask=mask)(q, k, v)
    torch.testing.assert_close(out, expected)


def test_offsets_beyond_32_bits(machine) -> None:
    """Two images 2^31 elements apart in memory of which little is touched."""
    apart, length = 2**31, 5
    try:
        memory = [torch.empty(apart + 4096, dtype=torch.bfloat16, device=machine.device)]
        memory += [torch.empty_like(memory[0])]
    except RuntimeError as error:
        pytest.skip(f"no memory for it: {error}")
    strides = (apart, 64, 32, 1)

    def view(number: int, tensor: Tensor | None = None) -> Tensor:
        place = memory[number % 2].as_strided((2, length, 2, 32), strides, number * 512)
        return place.fill_(torch.nan) if tensor is None else place.copy_(tensor)

    q, k, v = (tensor.bfloat16() for tensor in images(length, heads=2, features=32))
    expected = Attention(*machine, axis=0)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = expected(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))

    far = [view(number, tensor.detach()) for number, tensor in enumerate((q, k, v))]
    far_out, far_grad = view(3), view(4, torch.ones_like(out))
    lse = torch.empty(2, length, 2, device=machine.device)
    options = (None, None, 0, False, 32**-0.5)
    machine.library.axial_attention(*far, *options, far_out, lse)
    assert torch.equal(far_out.cpu(), out)
    far_grads = [view(number) for number in (5, 6, 7)]
    machine.library.axial_attention_backward(
        far_grad, *far, far_out, lse, *options, *far_grads, None
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(far_grads, grads, strict=True))


@pytest.mark.parametrize("shape", [(2, 0, 3, 16), (0, 5, 3, 16), (2, 5, 0, 16)])
def test_nothing_to_do(machine, shape) -> None:
    q = torch.empty(shape, device=machine.device)
    lse = torch.empty(shape[:-1], device=machine.device)
    bias = torch.ones(shape[2], shape[1], shape[1], device=machine.device)
    dbias = torch.full_like(bias, torch.nan)
    options = (bias, None, 0, False, 1.0)
    machine.library.axial_attention(q, q, q, *options, q, lse)
    machine.library.axial_attention_backward(q, q, q, q, q, lse, *options, q, q, q, dbias)
    assert (dbias == 0).all()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"q": (1025, 16)}, "q: expected rows of up to 1024 positions, got 1025"),
        ({"q": (5, 20)}, "q: expected 16 to 128 features a head in multiples of 8, got 20"),
        ({"q": (5, 8)}, "q: expected 16 to 128 features a head in multiples of 8, got 8"),
        ({"k": (5, 24)}, "k: expected size 16 in dimension 3, got 24"),
        ({"dtype": torch.float64}, "q: expected float32, float16 or bfloat16"),
        ({"axis": 1}, "axis: expected one of the grid, got 1"),
    ],
)
def test_what_is_refused(machine, changed, message) -> None:
    dtype = changed.get("dtype", torch.float32)

    def tensor(name: str) -> Tensor:
        length, features = changed.get(name, changed.get("q", (5, 16)))
        return torch.zeros(1, length, 2, features, dtype=dtype, device=machine.device)

    q = tensor("q")
    lse = torch.zeros(q.shape[:-1], device=machine.device)
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
