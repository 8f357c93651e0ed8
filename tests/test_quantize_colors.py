"""The nearest colour on every backend, and the palette fitted with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comparison import backends_here
from hypothesis import given, settings
from hypothesis import strategies as st

from gcrl_kernels import fit_palette, quantize_colors

BACKENDS = backends_here("quantize_colors")


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    colors=st.integers(1, 40),
    levels=st.sampled_from([2, 5, 256]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_integers_are_exact_and_the_lowest_index_wins(backend, shape, colors, levels, seed) -> None:
    generator = torch.Generator().manual_seed(seed)  # few levels: many ties
    pixels = torch.randint(0, levels, (*shape, 3), generator=generator, dtype=torch.uint8)
    palette = torch.randint(0, levels, (colors, 3), generator=generator)
    difference = pixels.long().numpy()[..., None, :] - palette.numpy()
    expected = torch.as_tensor(np.square(difference).sum(-1).argmin(-1))
    for pixel_dtype, palette_dtype in (
        (torch.uint8, torch.uint8),
        (torch.uint8, torch.int64),
        (torch.uint8, torch.float32),
        (torch.float32, torch.int32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        tokens = quantize_colors(pixels.to(pixel_dtype), palette.to(palette_dtype), backend=backend)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, expected.view(tokens.shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_are_nearest_to_rounding(backend, dtype) -> None:
    torch.manual_seed(0)
    pixels, palette = torch.randn(3000, 3).to(dtype), torch.randn(512, 3).to(dtype)
    tokens = quantize_colors(pixels, palette, backend=backend)
    distance = (pixels.double()[:, None] - palette.double()).square().sum(-1)
    chosen, least = distance.gather(1, tokens[:, None])[:, 0], distance.amin(1)
    rounding = 1e-14 if dtype == torch.float64 else 1e-5
    assert (chosen - least).max() <= rounding
    assert (tokens == distance.argmin(1)).float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_and_infinity(backend) -> None:
    palette = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [torch.nan, 1.0, 1.0]])
    pixels = torch.full((40, 3), 0.9)
    pixels[3, 1] = torch.nan
    pixels[7, 2] = torch.inf
    expected = torch.ones(40, dtype=torch.long)
    expected[3] = expected[7] = -1
    assert torch.equal(quantize_colors(pixels, palette, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend) -> None:
    pixels = torch.randint(0, 256, (3, 8, 6), dtype=torch.uint8)
    palette = torch.randint(0, 256, (3, 9), dtype=torch.uint8)
    strided = quantize_colors(pixels.permute(1, 2, 0)[::2], palette.T, backend=backend)
    contiguous = pixels.permute(1, 2, 0)[::2].contiguous(), palette.T.contiguous()
    assert torch.equal(strided, quantize_colors(*contiguous, backend="reference"))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"pixels": [1, 2, 3]}, TypeError, "pixels: expected a tensor, got list"),
        ({"pixels": torch.zeros(4, 3).int()}, TypeError, "pixels: expected a uint8 or floating"),
        ({"pixels": torch.zeros(4, 4)}, ValueError, r"pixels: expected \[..., 3\].* got \[4, 4\]"),
        (
            {"palette": torch.zeros(0, 3)},
            ValueError,
            r"palette: expected \[K, 3\] with at least one",
        ),
        ({"palette": torch.zeros(3)}, ValueError, r"palette: expected \[K, 3\]"),
        ({"palette": torch.zeros(4, 3, device="meta")}, ValueError, "palette: expected the device"),
        ({"backend": 3}, ValueError, "backend: expected"),
    ],
)
def test_bad_arguments(change, error, message) -> None:
    with pytest.raises(error, match=message):
        quantize_colors(**({"pixels": torch.zeros(4, 3), "palette": torch.zeros(5, 3)} | change))


def inertia(pixels: torch.Tensor, palette: torch.Tensor) -> float:
    return float((pixels - palette[quantize_colors(pixels, palette)]).square().sum())


def even(count: int) -> torch.Tensor:
    return torch.rand(count, 3) ** 2


def clustered(count: int) -> torch.Tensor:
    """Around 40 colours, some of them rare."""
    centers, shares = torch.rand(40, 3), torch.rand(40) ** 4
    chosen = torch.multinomial(shares, count, replacement=True)
    return centers[chosen] + 0.03 * torch.randn(count, 3)


@pytest.mark.parametrize("picture", [even, clustered])
@pytest.mark.parametrize("colors", [16, 128])
def test_palette_is_as_good_as_scikit_learn(picture, colors) -> None:
    from sklearn.cluster import KMeans

    pixels, seeds = picture(20_000), range(3)  # the best that is near hangs on the start
    ours = [inertia(pixels, fit_palette(pixels, colors, seed=seed)) for seed in seeds]
    models = [KMeans(colors, n_init=1, random_state=seed) for seed in seeds]
    assert sum(ours) <= 1.01 * sum(model.fit(pixels.numpy()).inertia_ for model in models)


def test_colours_that_no_pixel_is_nearest_to_move() -> None:
    """Two pixels in three are one colour, which the start draws but once if others are there."""
    pixels = torch.cat([torch.zeros(4000, 3), torch.rand(2000, 3)])
    palette = fit_palette(pixels, 64)
    assert len(quantize_colors(pixels, palette).unique()) == 64


def test_palette_finds_separate_colours_exactly() -> None:
    colors = torch.tensor([[0, 0, 0], [10, 200, 30], [250, 20, 90]], dtype=torch.uint8)
    pixels = colors[torch.randint(0, 3, (10, 20))]
    assert torch.equal(fit_palette(pixels, 3), colors.float())


def test_palette_repeats_from_its_seed() -> None:
    pixels = torch.rand(5000, 3)
    first, again, other = (fit_palette(pixels, 16, seed=seed, iterations=3) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32


def test_palette_of_fewer_distinct_pixels_than_colours() -> None:
    palette = fit_palette(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).repeat(8, 1), 5)
    assert palette.isfinite().all()
    assert {tuple(color) for color in palette.tolist()} == {(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(4, 3), 5), ValueError, r"pixels: expected at least as many as colors \(5\)"),
        ((torch.zeros(4, 3), 0), ValueError, "colors: expected at least 1, got 0"),
        ((torch.zeros(4, 3), 1.5), TypeError, "colors: expected an integer, got float"),
        ((torch.full((4, 3), torch.nan), 2), ValueError, "pixels: expected finite values"),
        ((torch.zeros(4, 2), 2), ValueError, r"pixels: expected \[..., 3\]"),
    ],
)
def test_bad_palette_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        fit_palette(*arguments)


@pytest.mark.parametrize(
    "iterations, error, message",
    [
        (-1, ValueError, "iterations: expected at least 0, got -1"),
        (2.0, TypeError, "iterations: expected an integer, got float"),
        (True, TypeError, "iterations: expected an integer, got bool"),
    ],
)
def test_bad_iterations(iterations, error, message) -> None:
    with pytest.raises(error, match=message):
        fit_palette(torch.rand(4, 3), 2, iterations=iterations)
