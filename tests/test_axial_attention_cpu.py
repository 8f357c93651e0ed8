"""The C++ kernels of axial attention: every instruction set, length of rows and dtype."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_as_accurate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_axial_attention import images, plain
from torch.profiler import ProfilerActivity, profile

from gcrl_kernels import axial_attention, axial_attention_packed, backends

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("every_cpu_level")


def ours(*, backend: str = "cpu", **options):
    return lambda q, k, v, bias=None: axial_attention(
        q, k, v, bias=bias, backend=backend, **options
    )


def test_new_memory_holds_nan() -> None:
    assert torch.empty(3).isnan().all()


# Lengths below, at and beyond a vector, a tile and a block of 64 queries; features likewise.
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "length, features", [(1, 16), (7, 3), (16, 64), (17, 24), (64, 40), (65, 128), (130, 16)]
)
def test_lengths_and_features(length, features, causal) -> None:
    inputs = images(length, 2, batch=1, heads=2, features=features)
    options = {"axis": 0, "causal": causal}
    assert_as_accurate(ours(**options), lambda *t: plain(*t, **options), inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_dtypes_and_bias(dtype, axis) -> None:
    inputs = images(3, 5, 18, batch=2, heads=2, features=24)
    inputs.append(torch.randn(2, (3, 5, 18)[axis], (3, 5, 18)[axis]))
    options = {"axis": axis, "causal": True}
    assert_as_accurate(ours(**options), lambda *t: plain(*t, **options), inputs, dtype)


@given(
    length=st.integers(1, 140),
    features=st.integers(1, 40),
    heads=st.integers(1, 3),
    causal=st.booleans(),
    biased=st.booleans(),
    masked=st.booleans(),
)
@example(length=52, features=1, heads=1, causal=False, biased=False, masked=True)
@settings(max_examples=15)
def test_any_row(length, features, heads, causal, biased, masked) -> None:
    inputs = images(2, length, batch=1, heads=heads, features=features)
    if biased:
        inputs.append(torch.randn(heads, length, length))
    options = {"axis": 1, "causal": causal}
    options["mask"] = torch.rand(1, 2, length) > 0.4 if masked else None
    assert_as_accurate(ours(**options), lambda *t: plain(*t, **options), inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_and_written_as_it_is(dtype) -> None:
    """A row of one position gives its value back: all 65,536 patterns, in every lane."""
    v = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, -1, 1, 1, 64)
    zeros = torch.zeros_like(v)
    out = axial_attention(zeros, zeros, v, 1, backend="cpu")
    known = ~v.isnan()
    assert torch.equal(out[known], v[known])
    assert out[~known].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_to_nearest_even(dtype) -> None:
    """The mean of two neighbours is theirs whose last bit is 0."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(-(2**15), 2**15 - 1, (2**14,), generator=generator).to(torch.int16)
    pairs = torch.stack([low, low + 1]).view(dtype).view(1, 2, -1, 1, 64)
    # The sum of two of the largest would overflow before it is halved.
    pairs = torch.where((pairs.abs() < torch.finfo(dtype).max / 2).all(1, keepdim=True), pairs, 0.0)
    zeros = torch.zeros_like(pairs)
    out = axial_attention(zeros, zeros, pairs, 0, backend="cpu")
    expected = pairs.double().mean(1, keepdim=True).to(dtype).expand_as(out)
    assert torch.equal(out, expected)


def test_gradients_of_a_bias_repeat_and_do_not_hang_on_the_threads() -> None:
    inputs = [t.requires_grad_() for t in (*images(9, 20, heads=1), torch.randn(1, 20, 20))]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            out = ours(axis=1)(*inputs)
            results.append(torch.autograd.grad(out.square().sum(), inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for one, many in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(one, many)


def test_nothing_is_concatenated_or_copied_for_the_packed_form() -> None:
    qkv = torch.randn(2, 6, 5, 3, 2, 16, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        axial_attention_packed(qkv, 0, backend="cpu").backward(torch.ones(2, 6, 5, 2, 16))
    called = {event.key for event in profiler.key_averages()}
    assert "gcrl_kernels_cpu::axial_attention_backward" in called
    assert not called & {"aten::cat", "aten::stack", "aten::clone", "aten::contiguous"}


def test_scores_out_of_range_give_what_softmax_gives() -> None:
    q, k, v = images(6, batch=1, heads=1)
    q[0, 2] = torch.inf
    q[0, 3] = torch.nan
    out = axial_attention(q, k, v, 0, backend="cpu")
    expected = plain(q, k, v, axis=0)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[0, 2:4].isnan().all()
    torch.testing.assert_close(out[0, :2], expected[0, :2])


def test_float64_is_the_references() -> None:
    q, k, v = (tensor.double() for tensor in images(4, 5))
    with pytest.raises(backends.BackendUnavailableError, match=r"float32, got torch\.float64"):
        axial_attention(q, k, v, 0, backend="cpu")
    assert torch.equal(
        axial_attention(q, k, v, 0), axial_attention(q, k, v, 0, backend="reference")
    )


def test_an_empty_axis() -> None:
    q = torch.empty(2, 0, 6, 3, 8, requires_grad=True)
    out = axial_attention(q, q, q, 0, backend="cpu")
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape
