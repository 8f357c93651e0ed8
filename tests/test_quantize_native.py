"""The compiled quantize_colors against NumPy in int64 and float64, on every instruction set."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from gcrl_kernels import backends

# On either side of each block of vectors, and of the work a thread takes at least.
COUNTS = [0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 33, 63, 64, 65, 127, 129, 515]
COLORS = [1, 2, 3, 17, 64, 512, 700]


@pytest.fixture(params=backends.cpu_levels() or [None])
def quantize(request: pytest.FixtureRequest, setup_script: ModuleType):
    if request.param is None:
        missing = pytest.skip if setup_script.find_compiler() is None else pytest.fail
        missing(f"no compiled CPU kernels: {backends.unavailable('cpu')}")
    with backends.use_cpu_level(request.param):
        yield torch.ops.gcrl_kernels_cpu.quantize_colors


def distances(pixels: torch.Tensor, palette: torch.Tensor) -> np.ndarray:
    """Squared distances [M, K]: exact in integers, else in float64."""
    exact = object if not pixels.is_floating_point() else np.float64
    difference = pixels.numpy().astype(exact)[:, None] - palette.numpy().astype(exact)[None]
    return np.square(difference).sum(-1)


def uint8_pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3), dtype=torch.uint8)


def check_nearest(indices: torch.Tensor, pixels: torch.Tensor, palette: torch.Tensor) -> None:
    """Each chosen colour is the nearest to within the rounding of its own distance."""
    every = distances(pixels, palette)
    assert indices.dtype == torch.int64
    assert indices.shape == pixels.shape[:-1]
    chosen = np.take_along_axis(every, indices.numpy()[:, None], 1)[:, 0]
    # Three differences, squares and sums: a few roundings, all relative to terms of one sign.
    slack = 8 * torch.finfo(pixels.dtype).eps
    np.testing.assert_array_less(chosen, every.min(1) * (1 + slack) + np.finfo(np.float64).tiny)


@pytest.mark.parametrize("count", COUNTS)
def test_uint8_is_exact_for_every_remainder(quantize, count: int) -> None:
    pixels = uint8_pixels(count)
    palette = torch.randint(0, 256, (64, 3), dtype=torch.int32)
    expected = distances(pixels, palette).astype(np.int64).argmin(1)
    np.testing.assert_array_equal(quantize(pixels, palette), expected)


@pytest.mark.parametrize("colors", COLORS)
def test_uint8_is_exact_for_every_palette_size(quantize, colors: int) -> None:
    pixels = uint8_pixels(300)
    # Coarse colours, so that ties abound, and each colour twice, so that the lowest index matters.
    palette = (torch.randint(0, 9, (colors, 3), dtype=torch.int32) * 31).repeat(2, 1)
    expected = distances(pixels, palette).astype(np.int64).argmin(1)
    np.testing.assert_array_equal(quantize(pixels, palette), expected)


@pytest.mark.parametrize(
    ("low", "high"), [(-2048, 2304), (-2049, 2304), (-2048, 2305), (-5000, 5000), (-(2**31), 2**31)]
)
def test_uint8_is_exact_for_any_int32_palette(quantize, low: int, high: int) -> None:
    pixels = uint8_pixels(100)
    palette = torch.randint(low, high, (50, 3), dtype=torch.int64)
    # The extremes, and two far colours that only exact arithmetic tells apart.
    palette = torch.cat([torch.tensor([[low, high - 1, low]]), palette])
    palette = torch.cat([palette, torch.tensor([[high - 1, 1, 1], [high - 1, 1, 0]])]).int()
    for part in (palette, palette[-2:].contiguous(), palette[:1]):
        expected = distances(pixels, part).argmin(1)
        np.testing.assert_array_equal(quantize(pixels, part), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 255.0, 1e-12, 1e12])
@pytest.mark.parametrize("colors", COLORS)
def test_floats_are_nearest_to_rounding(quantize, dtype, scale: float, colors: int) -> None:
    pixels = torch.rand(301, 3, dtype=dtype) * scale
    palette = torch.rand(colors, 3, dtype=dtype) * scale
    check_nearest(quantize(pixels, palette), pixels, palette)


def test_floats_far_from_zero_keep_their_accuracy(quantize) -> None:
    pixels = 4096 + torch.rand(300, 3)
    palette = 4096 + torch.rand(40, 3)
    check_nearest(quantize(pixels, palette), pixels, palette)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", COUNTS)
def test_integers_in_floats_are_exact(quantize, dtype, count: int) -> None:
    pixels, palette = uint8_pixels(count), torch.randint(0, 256, (90, 3), dtype=torch.int32)
    expected = distances(pixels, palette).astype(np.int64).argmin(1)
    np.testing.assert_array_equal(quantize(pixels.to(dtype), palette.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite(quantize, dtype) -> None:
    nan, inf = float("nan"), float("inf")
    palette = torch.tensor(
        [[nan, 0, 0], [9, 9, 9], [0, inf, 0], [1, 1, 1], [0, 0, nan], [1, 1, 1]], dtype=dtype
    )
    pixels = torch.tensor(
        [[0, 0, 0], [nan, 0, 0], [0, nan, 0], [0, 0, nan], [inf, 0, 0], [-inf, nan, 0], [8, 8, 8]],
        dtype=dtype,
    )
    assert quantize(pixels, palette).tolist() == [3, -1, -1, -1, -1, -1, 1]
    assert quantize(pixels, palette[:1]).tolist() == [-1, -1, -1, -1, -1, -1, -1]


def test_overflowing_distances_have_no_nearest_color(quantize) -> None:
    pixels = torch.tensor([[3e38, 0, 0], [1, 1, 1], [1e20, 0, 0]])
    palette = torch.tensor([[-3e38, 0, 0], [1, 1, 1]])
    assert quantize(pixels, palette).tolist() == [-1, 1, -1]


def palettes(scale: float) -> dict[str, torch.Tensor]:
    """Float palettes of 300 colours that lie differently."""
    even = torch.rand(300, 3) * scale
    return {
        "even": even,
        "far from zero": even + 16 * scale,
        "each colour twice": even[:150].repeat(2, 1),
        "two clusters": torch.cat([even[:299] * 0.01, even[299:] + scale]),
        "along grey": even[:, :1] + even * 1e-3,
        "one blue": even * torch.tensor([1.0, 1.0, 0.0]),
        "with what is not finite": torch.cat([even[:297], torch.diag(torch.tensor([np.nan] * 3))]),
        "with infinity": torch.cat([torch.diag(torch.tensor([-np.inf] * 3)), even[:297]]),
    }


@pytest.mark.parametrize("scale", [1.0, 255.0, 1e-25, 1e25])
@pytest.mark.parametrize("name", palettes(1.0))
def test_many_pixels_find_what_few_find(quantize, name: str, scale: float) -> None:
    """Many are sorted into cells of the palette's box, with the colours that are near each."""
    palette = palettes(scale)[name]
    pixels = palette[torch.randint(0, 300, (70_001,))].nan_to_num(0.0, 0.0, 0.0)
    pixels += torch.randn_like(pixels) * scale / 30
    pixels[::7] += torch.randn_like(pixels[::7]) * scale  # beside the box too
    pixels[5, 0], pixels[9, 1], pixels[-1, 2] = torch.nan, torch.inf, -torch.inf
    expected = torch.cat([quantize(part, palette) for part in pixels.split(1000)])
    assert torch.equal(quantize(pixels, palette), expected)


@pytest.mark.parametrize("levels", [4, 256])
def test_many_uint8_pixels_are_exact(quantize, levels: int) -> None:
    pixels = torch.randint(0, levels, (70_001, 3), dtype=torch.uint8)
    palette = torch.randint(0, levels, (200, 3), dtype=torch.int32)
    difference = pixels.numpy().astype(np.int32)[:, None] - palette.numpy()
    expected = np.square(difference).sum(-1).argmin(1)
    np.testing.assert_array_equal(quantize(pixels, palette), expected)


def test_shapes(quantize) -> None:
    palette = torch.rand(5, 3)
    assert quantize(torch.rand(3), palette).shape == ()
    assert quantize(torch.rand(2, 4, 5, 3), palette).shape == (2, 4, 5)
    assert quantize(torch.rand(2, 0, 3), palette).shape == (2, 0)


def test_threads_agree(quantize) -> None:
    pixels, palette = torch.rand(20_011, 3), torch.rand(300, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantize(pixels, palette)
        torch.set_num_threads(2)
        together = quantize(pixels, palette)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)
    check_nearest(together[-500:], pixels[-500:], palette)


@pytest.mark.parametrize(
    ("pixels", "palette", "message"),
    [
        (torch.rand(4, 2), torch.rand(5, 3), "pixels: expected size 3 in dimension 1, got 2"),
        (torch.rand(4, 3), torch.rand(5, 4), "palette: expected size 3 in dimension 1, got 4"),
        (torch.rand(4, 3), torch.rand(3), "palette: expected at least 2 dimensions, got 1"),
        (torch.rand(4, 3), torch.rand(2, 5, 3), "palette: expected 2 dimensions, got 3"),
        (torch.rand(4, 3), torch.rand(0, 3), "palette: expected between 1 and .* colours, got 0"),
        (torch.rand(3, 4).T, torch.rand(5, 3), "pixels: expected a contiguous tensor"),
        (torch.rand(4, 3), torch.rand(5, 3).double(), "expected uint8 and int32, float32 and"),
        (torch.rand(4, 3), torch.ones(5, 3).int(), "expected uint8 and int32, float32 and"),
    ],
)
def test_a_direct_call_is_checked(quantize, pixels, palette, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        quantize(pixels, palette)
