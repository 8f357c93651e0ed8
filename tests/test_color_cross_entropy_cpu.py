"""The C++ kernels of the colour-quantised losses: every instruction set, size, dtype and option."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_color_cross_entropy import nearest, plain
from torch import Tensor

from gcrl_kernels import backends, color_cross_entropy, linear_color_cross_entropy

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("every_cpu_level")


def scene(positions: int, colors: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 pixels, an integer palette and their tokens."""
    pixels = torch.randint(0, 256, (positions, 3), dtype=torch.uint8)
    palette = torch.randint(0, 256, (colors, 3), dtype=torch.uint8)
    return pixels, palette, nearest(pixels, palette)


def check_logits(logits: Tensor, dtype: torch.dtype, **options) -> None:
    pixels, palette, tokens = scene(*logits.shape)

    def ours(logits: Tensor) -> Tensor:
        return color_cross_entropy(logits, pixels, palette, backend="cpu", **options)

    assert_as_accurate(ours, lambda x: plain(x, tokens, **options), [logits], dtype)


def check_linear(
    positions: int, features: int, colors: int, biased: bool, dtype: torch.dtype, **options
) -> None:
    pixels, palette, tokens = scene(positions, colors)
    inputs = [torch.randn(positions, features), torch.randn(colors, features)]
    inputs += [torch.randn(colors)] if biased else []

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_color_cross_entropy(
            hidden, weight, pixels, palette, bias=bias, backend="cpu", **options
        )

    def apart(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        return plain(logits, tokens, **options)

    assert_as_accurate(ours, apart, inputs, dtype)


# Colours below, at and beyond a vector of each instruction set, and the most that are asked for.
@pytest.mark.parametrize("colors", [2, 3, 4, 5, 8, 15, 16, 17, 64, 100, 512, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_colors(colors, dtype) -> None:
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"}
    check_logits(torch.randn(9, colors) * 3, dtype, **options)
    check_linear(9, 5, colors, True, dtype, **options)


OPTIONS = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 0.01]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
)


@given(
    positions=st.integers(1, 70),
    features=st.integers(1, 40),
    colors=st.integers(2, 70),
    biased=st.booleans(),
    masked=st.booleans(),
    options=OPTIONS,
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40)
def test_any_shape_and_options(positions, features, colors, biased, masked, options, dtype) -> None:
    mask = torch.rand(positions) > 0.4
    mask[0] = True
    options = options | {"mask": mask if masked else None}
    check_logits(torch.randn(positions, colors) * 2, dtype, **options)
    check_linear(positions, features, colors, biased, dtype, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_several_chunks(reduction, masked) -> None:
    """At 4,096 colours a chunk has 256 positions."""
    options = {"reduction": reduction, "mask": torch.rand(700) > 0.4 if masked else None}
    check_linear(700, 3, 4096, True, torch.float32, **options)


def test_losses_of_large_logits_lose_nothing() -> None:
    """1,000 cancels between the log-sum-exp and the target's logit."""
    logits, tokens = torch.randn(40, 33) + 1000, torch.randint(0, 33, (40,))
    options = {"reduction": "none", "label_smoothing": 0.1}
    losses = color_cross_entropy(logits, tokens, backend="cpu", **options)
    exact = plain(logits.double(), tokens, **options).float()
    torch.testing.assert_close(losses, exact, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype) -> None:
    pixels, palette, _ = scene(12, 7)
    hidden, weight = torch.randn(5, 12), torch.randn(5, 7)
    mask = (torch.rand(12, 2) > 0.4)[:, 1]
    for strided in (
        [hidden.T, weight.T],
        [torch.randn(12, 9)[:, 2:7], torch.randn(14, 5)[::2]],
        [torch.randn(3, 5, 4).transpose(1, 2).flatten(0, 1), weight.T],
        [torch.randn(1, 5).expand(12, 5), torch.randn(7, 1).expand(7, 5)],
    ):
        results = []
        for layout in (lambda tensor: tensor, lambda tensor: tensor.contiguous()):
            leaves = [layout(tensor.to(dtype)).detach().requires_grad_() for tensor in strided]
            logits = layout((leaves[0] @ leaves[1].T).T.contiguous().T)
            options = {"mask": mask, "reduction": "none", "backend": "cpu"}
            losses = (
                linear_color_cross_entropy(*leaves, pixels, palette, **options),
                color_cross_entropy(logits, pixels, palette, **options),
            )
            for loss in losses:
                upstream = layout(torch.linspace(1, 2, 24).view(12, 2))[:, 0]
                results.append([loss, *torch.autograd.grad(loss, leaves, upstream, True)])
        for strided_form, plain_form in zip(results[:2], results[2:], strict=True):
            for one, other in zip(strided_form, plain_form, strict=True):
                torch.testing.assert_close(one, other)


def test_logits_of_minus_infinity_have_no_probability() -> None:
    logits = torch.randn(6, 20)
    logits[:, ::3] = -torch.inf
    tokens = torch.full((6,), 4)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    ours = color_cross_entropy(leaves[0], tokens, backend="cpu")
    theirs = plain(leaves[1], tokens)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours, leaves[0]), torch.autograd.grad(theirs, leaves[1]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_results_repeat_and_do_not_hang_on_the_threads() -> None:
    pixels, palette, _ = scene(3000, 40)
    leaves = [torch.randn(s).requires_grad_() for s in ((3000, 8), (40, 8), (40,))]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            loss = linear_color_cross_entropy(
                *leaves[:2], pixels, palette, bias=leaves[2], backend="cpu"
            )
            results.append([loss, *torch.autograd.grad(loss, leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for one, many in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(one, many)


def test_float64_is_the_references() -> None:
    pixels, palette, _ = scene(5, 4)
    hidden, weight = torch.randn(5, 3).double(), torch.randn(4, 3).double()
    for function, inputs in (
        (linear_color_cross_entropy, (hidden, weight)),
        (color_cross_entropy, (hidden @ weight.T,)),
    ):
        with pytest.raises(backends.BackendUnavailableError, match=r"float32, got torch\.float64"):
            function(*inputs, pixels, palette, backend="cpu")
        loss = function(*inputs, pixels, palette)
        assert torch.equal(loss, function(*inputs, pixels, palette, backend="reference"))


def test_a_direct_call_is_checked() -> None:
    library = torch.ops.gcrl_kernels_cpu
    tokens = torch.zeros(4, dtype=torch.long)
    losses = [torch.empty(4), torch.empty(4), torch.empty(4), tokens]
    for logits, targets, message in (
        (torch.rand(4, 5), tokens[:3], "pixels: expected 4, got 3"),
        (torch.rand(5, 4).T, tokens, "logits: expected .M, K. with a last stride of 1"),
        (torch.rand(4, 5).double(), tokens, "logits: expected float32, float16 or bfloat16"),
        (torch.rand(3, 5), tokens[:3], r"loss: expected \[3\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            library.color_cross_entropy(logits, targets, None, None, 0.0, 0.0, *losses)
