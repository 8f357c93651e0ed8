"""The C++ kernels of the contrastive losses: every instruction set, shape and dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparison import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contrastive import plain
from test_contrastive_family import plain_dcl, plain_info_nce, plain_supcon
from torch import Tensor

from benchmarks.measure import peak_bytes
from gcrl_kernels import backends, dcl, info_nce, nt_xent, supcon
from gcrl_kernels.contrastive import ops
from gcrl_kernels.contrastive.reference import NEGATIVES, OTHERS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("every_cpu_level")


def pair(count: int, features: int, scale: float = 1.0) -> list[Tensor]:
    """Two views that have much in common."""
    torch.manual_seed(count)
    image, *views = torch.randn(3, count, features)
    return [scale * (image + view) for view in views]


def ours(**options: Any):
    return lambda z0, z1: nt_xent(z0, z1, backend="cpu", **options)


# Below, at and beyond a vector, a block of rows of either size and a stretch of features.
@pytest.mark.parametrize(
    "count, features", [(1, 1), (2, 3), (31, 16), (33, 17), (64, 40), (129, 128), (200, 300)]
)
def test_shapes(count, features) -> None:
    inputs = pair(count, features)
    assert_as_accurate(ours(), plain, inputs, torch.float32)
    assert_as_accurate(
        lambda a, b: info_nce(a, b, logit_scale=4.0, backend="cpu"),
        lambda a, b: plain_info_nce(a, b, 4.0), inputs, torch.float32,
    )  # fmt: skip
    if count == 1:  # nobody else
        return
    assert_as_accurate(lambda *z: dcl(*z, backend="cpu"), plain_dcl, inputs, torch.float32)
    labels = torch.arange(count) % 7
    assert_as_accurate(
        lambda z: supcon(z, labels, reduction="sum", backend="cpu"),
        lambda z: plain_supcon(z, labels, reduction="sum"), inputs[:1], torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("features", [2048, 4096])
def test_many_features(features) -> None:
    assert_as_accurate(ours(), plain, pair(40, features), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, -0.05])
@pytest.mark.parametrize("further", [0, 70])
def test_dtypes_and_temperatures(dtype, temperature, further) -> None:
    negatives = torch.randn(further, 24).to(dtype) if further else None

    def function(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
        like = None if negatives is None else negatives.to(z0.dtype)
        return ours(temperature=tau, negatives=like)(z0, z1)

    inputs = [*pair(90, 24), torch.tensor(temperature)]
    assert_as_accurate(function, lambda *t: plain(*t, negatives=negatives), inputs, dtype)


@given(
    count=st.integers(1, 150),
    features=st.integers(1, 40),
    temperature=st.sampled_from([1.0, 0.2, 0.01, -0.1]),
    unit=st.booleans(),
    further=st.integers(0, 40),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    stride=st.integers(1, 3),
)
@settings(max_examples=15)
def test_any_batch(count, features, temperature, unit, further, reduction, stride) -> None:
    negatives = torch.randn(further, features) if further else None
    if not unit:  # their scores are large enough
        temperature = math.copysign(1.0, temperature)
    options = {"temperature": temperature, "negatives": negatives, "reduction": reduction}

    def laid_out(z: Tensor) -> Tensor:
        """With that stride over features, and rows farther apart."""
        wide = z.new_zeros(len(z), stride * features + 3)
        return wide[:, : stride * features : stride].copy_(z)

    assert_as_accurate(
        lambda *z: ours(normalize=unit, **options)(*map(laid_out, z)),
        lambda *z: plain(*z, unit=unit, **options),
        pair(count, features), torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("spread", [1, 3, 30])
def test_scores_that_lie_far_apart(spread) -> None:
    """Rows of very different lengths: one exponential no longer serves a whole tile."""
    z0, z1 = pair(150, 8)
    lengths = torch.linspace(0.1, spread, 150)[:, None]
    inputs, labels = [z0 * lengths, z1 * lengths.flip(0)], torch.arange(150) % 4
    assert_as_accurate(
        ours(normalize=False), lambda *z: plain(*z, unit=False), inputs, torch.float32
    )
    assert_as_accurate(
        lambda *z: dcl(*z, normalize=False, backend="cpu"),
        lambda *z: plain_dcl(*z, unit=False), inputs, torch.float32,
    )  # fmt: skip
    assert_as_accurate(
        lambda z: supcon(z, labels, normalize=False, backend="cpu"),
        lambda z: plain_supcon(z, labels, unit=False), inputs[:1], torch.float32,
    )  # fmt: skip


def test_large_scores_round_no_weights() -> None:
    """All scores are about 1,000: rounding its log-sum-exp there shifts a row's whole gradient."""
    inputs = [(math.sqrt(1000 / 16) + z / 16) / 32 for z in pair(150, 16)]
    assert_as_accurate(
        ours(normalize=False, temperature=2.0**-10, reduction="sum"),
        lambda *z: plain(*z, 2.0**-10, unit=False, reduction="sum"), inputs, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("candidates", [OTHERS, NEGATIVES])
@pytest.mark.parametrize("rows, columns, diagonal", [(70, 200, 50), (6, 9, None), (300, 300, 0)])
def test_blocks(candidates, rows, columns, diagonal) -> None:
    """Rows against columns, as processes have them."""
    z, others = torch.randn(rows, 20) / 4, torch.randn(columns, 20) / 4
    scale = torch.tensor(3.0)
    lse = [
        ops.block_lse(z, others, scale, 0.0, candidates, diagonal, name)
        for name in ("cpu", "reference")
    ]
    exact = [each.double().sum(0) for each in lse]
    torch.testing.assert_close(*exact, rtol=0, atol=4e-6)  # of scores to 3, summed in float32
    other_lse = torch.stack([torch.rand(columns) + 3, torch.rand(columns) * 1e-7])
    for columns_have in (True, False):
        numbers = (other_lse, torch.rand(columns)) if columns_have else (None, None)
        options = (lse[1], torch.rand(rows), others, *numbers, scale, 0.0, candidates, diagonal)
        for actual, expected in zip(
            *(ops.block_gradient(z, *options, name) for name in ("cpu", "reference")), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_it_repeats_and_does_not_hang_on_the_threads() -> None:
    inputs = [z.requires_grad_() for z in (*pair(300, 20), torch.tensor(0.2))]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            loss = nt_xent(*inputs[:2], temperature=inputs[2], backend="cpu")
            results.append([loss, *torch.autograd.grad(loss, inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    for several in zip(*results, strict=True):
        for one in several[1:]:
            torch.testing.assert_close(one, several[0])


def test_memory_beyond_inputs_and_gradients() -> None:
    """A copy of the embeddings, and what a few tiles take."""
    z0, z1 = (z.requires_grad_() for z in pair(4096, 128))

    def call() -> list[Tensor]:
        return list(torch.autograd.grad(nt_xent(z0, z1, backend="cpu"), (z0, z1)))

    peak, threads = peak_bytes(call), torch.get_num_threads()
    assert peak is not None
    assert peak < 8192 * 144 * 4 + threads * 200_000 + (4 << 20)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows(value) -> None:
    for place in (0, 40):
        z0, z1 = pair(70, 20)
        z1[place, 3] = value
        assert nt_xent(z0, z1, backend="cpu").isnan()
        assert dcl(z0, z1, backend="cpu").isnan()
        assert info_nce(z0, z1, logit_scale=2.0, backend="cpu").isnan()
        assert supcon(z1, torch.arange(70) % 3, backend="cpu").isnan()
        assert not nt_xent(z0, z1, normalize=False, backend="cpu").isfinite()


def test_float64_is_the_references() -> None:
    z0, z1 = (z.double() for z in pair(4, 5))
    with pytest.raises(backends.BackendUnavailableError, match=r"float32, got torch\.float64"):
        nt_xent(z0, z1, backend="cpu")
    assert torch.equal(nt_xent(z0, z1), nt_xent(z0, z1, backend="reference"))


def test_opcheck() -> None:
    z0, z1 = (z.requires_grad_() for z in pair(5, 4))
    scale = torch.tensor(2.0, requires_grad=True)
    further = (torch.randn(2, 4), None, None, scale, 0.0, NEGATIVES, True, "cpu")
    torch.library.opcheck(ops.contrast, (z0, z1, *further))
    classes = (None, torch.arange(5).int() % 2, torch.ones(5), None, 2.0, OTHERS, False, "cpu")
    torch.library.opcheck(ops.contrast, (z0, None, *classes))
    torch.library.opcheck(ops.block_lse, (z0, z1.detach(), scale, 0.0, OTHERS, 0, "cpu"))
