"""The contrastive losses in CUDA C++: in an emulator on the CPU, and on a GPU if there is one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from comparison import assert_as_accurate
from emulation import Emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from nvcc_report import resources
from test_contrastive import plain
from test_contrastive_family import plain_dcl, plain_info_nce, plain_supcon
from torch import Tensor

from gcrl_kernels import backends, dcl, info_nce, nt_xent, supcon
from gcrl_kernels.contrastive import ops
from gcrl_kernels.contrastive.reference import NEGATIVES, OTHERS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Machine(NamedTuple):
    """Where the kernels run."""

    device: str

    def there(self, function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        """A function of tensors of the CPU that computes on this device, with these kernels."""

        def on_device(value: Any) -> Any:
            return value.to(self.device) if isinstance(value, Tensor) else value

        def call(*tensors: Tensor) -> Tensor:
            given = {name: on_device(value) for name, value in options.items()}
            if given.get("negatives") is not None:
                given["negatives"] = given["negatives"].to(tensors[0].dtype)
            return function(*map(on_device, tensors), **given, backend="cuda").cpu()

        return call


@contextmanager
def emulated(library: str | Path) -> Iterator[Machine]:
    """The backend with an emulated library in place of the compiled one."""
    torch.ops.load_library(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "gcrl_kernels_cuda", torch.ops.gcrl_kernels_emulated)
        patch.setitem(backends._SERVES, "cuda", "cpu")
        patch.delitem(backends._MISSING, "cuda", raising=False)
        yield Machine("cpu")


@pytest.fixture(scope="module", params=["emulated", "gpu"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Outputs hold NaN until they are written."""
    if request.param == "gpu":
        reason = backends.unavailable("cuda")
        if reason is not None:
            pytest.skip(reason)
    torch.use_deterministic_algorithms(True)  # this fills new memory
    try:
        if request.param == "gpu":
            yield Machine("cuda")
            return
        emulator: Emulator = request.getfixturevalue("emulator")
        with emulated(emulator.library("contrastive.cpp", "-O1")) as here:
            yield here
    finally:
        torch.use_deterministic_algorithms(False)


def pair(count: int, features: int, scale: float = 1.0) -> list[Tensor]:
    """Two views that have much in common."""
    torch.manual_seed(count)
    image, *views = torch.randn(3, count, features)
    return [scale * (image + view) for view in views]


def check_family(machine: Machine, count: int, features: int, dtype: torch.dtype) -> None:
    """All four losses and their gradients."""
    inputs = pair(count, features)
    assert_as_accurate(machine.there(nt_xent), plain, inputs, dtype)
    assert_as_accurate(
        machine.there(info_nce, logit_scale=4.0),
        lambda a, b: plain_info_nce(a, b, 4.0), inputs, dtype,
    )  # fmt: skip
    if count == 1:  # nobody else
        return
    assert_as_accurate(machine.there(dcl), plain_dcl, inputs, dtype)
    labels = torch.arange(count) % 7
    assert_as_accurate(
        machine.there(supcon, labels=labels, reduction="sum"),
        lambda z: plain_supcon(z, labels, reduction="sum"), inputs[:1], dtype,
    )  # fmt: skip


# Below, at and beyond a warp's rows, a block's, a tile's columns, a chunk, a step and the features
# that one block takes.
SHAPES = [(1, 1), (2, 3), (16, 32), (33, 17), (32, 64), (45, 130)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, features", SHAPES)
def test_shapes(machine, count, features, dtype) -> None:
    check_family(machine, count, features, dtype)


@pytest.mark.parametrize(
    "count, features, dtype", [*((9, 300, dtype) for dtype in DTYPES), (2, 4096, torch.bfloat16)]
)
def test_many_features(machine, count, features, dtype) -> None:
    """Rows that do not stay in shared memory, gradients in several blocks."""
    assert_as_accurate(machine.there(nt_xent), plain, pair(count, features), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, -0.05])
@pytest.mark.parametrize("further", [0, 70])
def test_dtypes_and_temperatures(machine, dtype, temperature, further) -> None:
    negatives = torch.randn(further, 24).to(dtype) if further else None

    def ours(z0: Tensor, z1: Tensor, temperature: Tensor) -> Tensor:
        call = machine.there(
            lambda a, b, tau, **options: nt_xent(a, b, temperature=tau, **options),
            negatives=negatives,
        )
        return call(z0, z1, temperature)

    inputs = [*pair(40, 24), torch.tensor(temperature)]
    assert_as_accurate(ours, lambda *t: plain(*t, negatives=negatives), inputs, dtype)


@given(
    count=st.integers(1, 80),
    features=st.integers(1, 70),
    temperature=st.sampled_from([1.0, 0.2, 0.01, -0.1]),
    unit=st.booleans(),
    further=st.integers(0, 40),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    stride=st.integers(1, 3),
)
@settings(max_examples=10)
def test_any_batch(machine, count, features, temperature, unit, further, reduction, stride) -> None:
    negatives = torch.randn(further, features) if further else None
    if not unit:  # their scores are large enough
        temperature = math.copysign(1.0, temperature)
    options = {"temperature": temperature, "negatives": negatives, "reduction": reduction}

    def laid_out(z: Tensor) -> Tensor:
        """With that stride over features, and rows farther apart."""
        wide = z.new_zeros(len(z), stride * features + 3)
        return wide[:, : stride * features : stride].copy_(z)

    call = machine.there(nt_xent, normalize=unit, **options)
    assert_as_accurate(
        lambda *z: call(*map(laid_out, z)), lambda *z: plain(*z, unit=unit, **options),
        pair(count, features), torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1, 30])
def test_scores_that_lie_far_apart(machine, dtype, spread) -> None:
    """Rows of very different lengths: one exponential no longer serves every pair."""
    z0, z1 = pair(50, 8)
    lengths = torch.linspace(0.1, spread, 50)[:, None]
    inputs, labels = [z0 * lengths, z1 * lengths.flip(0)], torch.arange(50) % 4
    for ours, matrix in (nt_xent, plain), (dcl, plain_dcl):
        assert_as_accurate(
            machine.there(ours, normalize=False),
            lambda *z, matrix=matrix: matrix(*z, unit=False), inputs, dtype,
        )  # fmt: skip
    assert_as_accurate(
        machine.there(supcon, labels=labels, normalize=False),
        lambda z: plain_supcon(z, labels, unit=False), inputs[:1], dtype,
    )  # fmt: skip


def test_large_scores_round_no_weights(machine) -> None:
    """All scores are about 1,000: rounding its log-sum-exp there shifts a row's whole gradient."""
    inputs = [(math.sqrt(1000 / 16) + z / 16) / 32 for z in pair(60, 16)]
    assert_as_accurate(
        machine.there(nt_xent, normalize=False, temperature=2.0**-10, reduction="sum"),
        lambda *z: plain(*z, 2.0**-10, unit=False, reduction="sum"), inputs, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("size", [1e-9, 3e4])
def test_fp16_keeps_weights_and_embeddings_of_any_size(machine, size) -> None:
    """Upstream gradients far below its least number, and far above its largest; long vectors."""
    z0, z1 = (z.half().requires_grad_() for z in pair(40, 24, 1e3))
    loss = machine.there(nt_xent)(z0, z1)
    gradients = torch.autograd.grad(loss * size / 1e-3, (z0, z1))
    doubles = [z.detach().double().requires_grad_() for z in (z0, z1)]
    exact = torch.autograd.grad(plain(*doubles) * size / 1e-3, doubles)
    for actual, expected in zip(gradients, exact, strict=True):
        slack = 2e-3 * float(expected.abs().max()) + 2.0**-24
        assert float((actual.double() - expected).abs().max()) < slack


@pytest.mark.parametrize("candidates", [OTHERS, NEGATIVES])
@pytest.mark.parametrize("rows, columns, diagonal", [(70, 200, 50), (6, 9, None), (130, 130, 0)])
def test_blocks(machine, candidates, rows, columns, diagonal) -> None:
    """Rows against columns, as processes have them."""
    device = machine.device
    z, others = (torch.randn(n, 20, device=device) / 4 for n in (rows, columns))
    scale = torch.tensor(3.0, device=device)
    lse = [
        ops.block_lse(z, others, scale, 0.0, candidates, diagonal, name)
        for name in ("cuda", "reference")
    ]
    exact = [each.double().sum(0) for each in lse]
    torch.testing.assert_close(*exact, rtol=0, atol=4e-6)  # of scores to 3, summed in float32
    column_lse = torch.stack([torch.rand(columns) + 3, torch.rand(columns) * 1e-7]).to(device)
    numbers = [column_lse, torch.rand(columns, device=device)]
    grad = torch.rand(rows, device=device)
    for given_numbers in (numbers, [None, None]):
        options = (lse[1], grad, others, *given_numbers, scale, 0.0, candidates, diagonal)
        for actual, expected in zip(
            *(ops.block_gradient(z, *options, name) for name in ("cuda", "reference")), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_score_is_the_same_whichever_is_the_row(machine) -> None:
    """To the last bit: the log-sum-exps of two vectors that have only one another."""
    for _ in range(30):
        z = [torch.randn(1, 9, device=machine.device) for _ in range(2)]
        _, lse = ops.contrast(*z, None, None, None, None, 14.3, OTHERS, True, "cuda")
        assert lse[0, 0] == lse[0, 1]


@pytest.mark.parametrize("spread", [0, 1])
@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_blocks_of_large_scores(machine, offset, spread) -> None:
    """About the offset's square, and exact in float32; all about the same, or with wide gaps."""
    device = machine.device
    rows, columns = (torch.randint(-2, 3, (n, 6)) / 2.0 for n in (40, 70))
    rows[:, 0] = offset + spread * (torch.arange(40) % 3)
    columns[:, 0] = offset
    row_grad, column_grad = torch.rand(40), torch.rand(70)
    lse = [
        ops.block_lse(a.to(device), b.to(device), None, 1.0, OTHERS, None, "cuda")
        for a, b in ((rows, columns), (columns, rows))
    ]
    exact = rows.double() @ columns.double().T
    for ours, each in zip(lse, (exact.logsumexp(1), exact.logsumexp(0)), strict=True):
        assert torch.equal(ours[0].cpu(), each.float())
        torch.testing.assert_close(ours.cpu().double().sum(0), each, rtol=0, atol=1e-6)
    both = row_grad[:, None] * exact.softmax(1) + column_grad * exact.softmax(0)
    given = (rows, lse[0], row_grad, columns, lse[1], column_grad)
    drows, dscale = ops.block_gradient(
        *(t.to(device) for t in given), None, 1.0, OTHERS, None, "cuda"
    )
    expected = both @ columns.double()
    torch.testing.assert_close(drows.cpu().double(), expected, rtol=2e-6, atol=2e-6)
    expected = (both * exact).sum() / 2
    torch.testing.assert_close(dscale.cpu().double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_little_shared_memory(emulator: Emulator, dtype) -> None:
    with emulated(emulator.library("contrastive.cpp", "-O1")) as machine:
        torch.ops.gcrl_kernels_emulated.set_contrast_device(1, 64 << 10)
        try:
            assert_as_accurate(machine.there(nt_xent), plain, pair(70, 130), dtype)
        finally:
            torch.ops.gcrl_kernels_emulated.set_contrast_device(1, 227 << 10)


def test_no_rows(machine) -> None:
    """Called directly: what sums over rows is zero, the rest is as empty as the rows."""
    library, device = torch.ops.gcrl_kernels_cuda, machine.device
    rows, empty, columns = (torch.randn(n, 4, device=device) for n in (0, 0, 5))
    numbers, none = torch.rand(5, device=device), torch.empty(0, device=device)
    for others in (empty, columns):
        dscale = torch.full((), torch.nan, device=device)
        anchors, lse = none.clone(), torch.empty(2, 0, device=device)
        library.contrast(rows, empty, others, None, None, None, 2.0, 0, True, anchors, lse)
        library.contrast_backward(
            none, rows, empty, others, None, None, None, lse, 2.0, 0, True, empty.clone(),
            empty.clone(), dscale,
        )  # fmt: skip
        assert dscale == 0
        dscale.fill_(torch.nan)
        library.contrast_block_lse(rows, others, None, 2.0, 0, -1, lse)
        weights = (numbers.expand(2, -1).contiguous(), numbers) if len(others) else (None, None)
        library.contrast_block_gradient(
            rows, lse, none, others, *weights, None, 2.0, 0, -1, empty.clone(), dscale
        )
        assert dscale == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_repeats(machine, dtype) -> None:
    inputs = [z.to(dtype).requires_grad_() for z in (*pair(80, 70), torch.tensor(0.2))]
    results = []
    for _ in range(2):
        call = machine.there(lambda a, b, tau, **options: nt_xent(a, b, temperature=tau, **options))
        loss = call(*inputs)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows(machine, dtype, value) -> None:
    for place in (0, 34):
        z0, z1 = (z.to(dtype) for z in pair(35, 20))
        z1[place, 3] = value
        assert machine.there(nt_xent)(z0, z1).isnan()
        assert machine.there(dcl)(z0, z1).isnan()
        assert machine.there(info_nce, logit_scale=2.0)(z0, z1).isnan()
        assert machine.there(supcon, labels=torch.arange(35) % 3)(z1).isnan()
        assert not machine.there(nt_xent, normalize=False)(z0, z1).isfinite()
        leaf = z1.requires_grad_()
        gradient = torch.autograd.grad(machine.there(nt_xent)(z0, leaf), leaf)[0]
        assert gradient.isnan().any()


def test_the_edges(machine) -> None:
    z0, z1 = (z.requires_grad_() for z in pair(1, 5))
    assert machine.there(dcl)(z0, z1) == -torch.inf  # nobody to tell the positive from
    z = torch.cat([z0, z1])
    alone = machine.there(supcon, labels=torch.tensor([4, 5]), reduction="none")(z)
    assert torch.equal(alone, torch.zeros(2))
    assert torch.equal(torch.autograd.grad(alone.sum(), z0)[0], torch.zeros_like(z0))
    a, b = pair(6, 5)
    a[2], b[3] = 0, 1e-14
    leaves = [z.requires_grad_() for z in (a, b)]
    ours, matrix = machine.there(nt_xent)(*leaves), plain(*leaves)
    torch.testing.assert_close(ours, matrix)
    for actual, expected in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(matrix, leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"z0": torch.zeros(5)}, "z0: expected two dimensions"),
        ({"z0": torch.zeros(4, 3).double()}, "z0: expected float32, float16 or bfloat16"),
        ({"z0": torch.zeros(3, 4).T}, "z0: expected features side by side"),
        ({"z1": torch.zeros(4, 2)}, "z1: expected two dimensions and 3 features"),
        ({"z1": torch.zeros(5, 3)}, "z1: expected 4 rows, got 5"),
        ({"z1": torch.zeros(4, 3).half()}, "z1: unexpected dtype"),
        ({"losses": torch.zeros(4)}, "losses: expected 8 numbers, got 4"),
        ({"candidates": 3}, "candidates: expected 0, 1 or 2, got 3"),
    ],
)
def test_what_is_refused(machine, changed, message) -> None:
    arguments = {
        "z0": torch.zeros(4, 3),
        "z1": torch.zeros(4, 3, dtype=changed.get("z0", torch.zeros(())).dtype),
        "candidates": 0,
        "losses": torch.zeros(8),
    } | changed
    there = {
        name: value.to(machine.device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.gcrl_kernels_cuda.contrast(
            there["z0"], there["z1"], None, None, None, None, 2.0, there["candidates"], True,
            there["losses"], torch.zeros(2, 8, device=machine.device),
        )  # fmt: skip


SANITIZED = """
import sys, torch
import missing
missing.stand_in_for_hypothesis()
import test_contrastive_cuda as tests
with tests.emulated(sys.argv[1]) as machine:
    for number, (count, features) in enumerate([(1, 1), (17, 9), (2, 130)]):
        tests.check_family(machine, count, features, tests.DTYPES[number])
    tests.test_many_features(machine, 2, 300, torch.float16)
    tests.test_blocks(machine, tests.NEGATIVES, 6, 70, 30)
print("done")
"""


def test_within_its_memory(emulator: Emulator) -> None:
    """A sample under the sanitizers of addresses and of undefined behaviour."""
    emulator.run_sanitized(SANITIZED, "contrastive.cpp")


def test_compiles_without_spills_or_stack(
    root: Path, setup_script: ModuleType, tmp_path: Path
) -> None:
    """By the compiler's own report of each kernel for each architecture."""
    compiled = resources(root, setup_script, tmp_path, "contrastive/cuda.cu")
    for kernel in ("pack_embeddings", "contrast_forward", "contrast_backward", "weigh_anchors"):
        assert any(kernel in each.kernel for each in compiled)
    assert [each for each in compiled if each.stack or each.spill_stores or each.spill_loads] == []
