"""Images of any size on a grid: which part is kept, and how it is averaged or resampled."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import random_images

from gcrl.data import fit_to_grid
from gcrl.data.resize import centred_part


def test_blocks_are_averaged_exactly() -> None:
    images = random_images(5, 12, 24, 3)
    fitted = fit_to_grid(images, (4, 8))
    means = images.astype(float).reshape(5, 4, 3, 8, 3, 3).mean(axis=(2, 4))
    assert fitted.dtype == np.uint8
    assert np.array_equal(fitted, np.floor(means + 0.5))


def test_white_stays_white_in_large_blocks() -> None:
    images = np.full((1, 2048, 2048, 3), 255, dtype=np.uint8)
    assert (fit_to_grid(images, (2, 2)) == 255).all()


def test_the_middle_is_kept_where_the_aspect_differs() -> None:
    images = np.zeros((2, 16, 48, 3), dtype=np.uint8)
    images[:, :, 16:32] = random_images(2, 16, 16, 3)
    assert np.array_equal(fit_to_grid(images, (8, 8)), fit_to_grid(images[:, :, 16:32], (8, 8)))
    assert np.array_equal(fit_to_grid(images, (16, 16)), images[:, :, 16:32])


@pytest.mark.parametrize("size", [(7, 7), (30, 20), (100, 37), (64, 65)])
def test_other_sizes_are_resampled(size: tuple[int, int]) -> None:
    row, column = np.mgrid[: size[0], : size[1]] + 0.5
    waves = np.stack([row / size[0], column / size[1], 0 * row], axis=-1) * 200
    fitted = fit_to_grid(waves.astype(np.uint8)[np.newaxis], (16, 16))[0].astype(float)
    assert fitted.shape == (16, 16, 3)
    middle = fitted[4:12, 4:12].mean(axis=(0, 1))
    assert middle == pytest.approx([100, 100, 0], abs=2)


def test_fine_stripes_are_smoothed_not_sampled() -> None:
    stripes = np.zeros((1, 50, 50, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(fit_to_grid(stripes, (16, 16)).astype(int) - 100).max() < 25


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)],
)
def test_fit_to_grid_refuses_other_arrays(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images: expected uint8"):
        fit_to_grid(images, (4, 4))


def exact_part(size: tuple[int, int], grid: tuple[int, int]) -> tuple[Fraction, ...]:
    """(left, top, right, bottom) without rounding."""
    side = min(Fraction(size[0], grid[0]), Fraction(size[1], grid[1]))
    rows, columns = side * grid[0], side * grid[1]
    top, left = (size[0] - rows) / 2, (size[1] - columns) / 2
    return left, top, left + columns, top + rows


def assert_inside(size: tuple[int, int], grid: tuple[int, int]) -> None:
    left, top, right, bottom = part = centred_part(size, grid)
    assert 0 <= left < right <= size[1]
    assert 0 <= top < bottom <= size[0]
    assert part == pytest.approx([float(edge) for edge in exact_part(size, grid)], rel=1e-12)


def test_every_part_lies_inside_its_image() -> None:
    for grid in range(2, 65):
        for side in range(2, 513):
            left, top, right, bottom = centred_part((side, side), (grid, grid))
            assert (left, top, right, bottom) == (0, 0, side, side)
            left, top, right, bottom = centred_part((side, 361), (grid, 37))
            assert 0 <= left < right <= 361
            assert 0 <= top < bottom <= side


sides = st.integers(1, 2000)


@given(st.tuples(sides, sides), st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_parts_of_other_shapes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert_inside(size, grid)


def area_means(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """float [h, w] -> the mean of each pixel's rectangle of the kept part, in any ratio."""
    left, top, right, bottom = exact_part(image.shape[:2], grid)

    def weights(start: Fraction, stop: Fraction, size: int, count: int) -> np.ndarray:
        edges = [start + (stop - start) * i / count for i in range(count + 1)]
        out = np.zeros((count, size))
        for i in range(count):
            for j in range(int(edges[i]), ceil(edges[i + 1])):
                out[i, j] = min(edges[i + 1], j + 1) - max(edges[i], j)
        return out / out.sum(axis=1, keepdims=True)

    down = weights(top, bottom, image.shape[0], grid[0])
    across = weights(left, right, image.shape[1], grid[1])
    return down @ image @ across.T


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((250, 250), (30, 30)),
        ((225, 225), (28, 28)),
        ((224, 224), (50, 50)),
        ((218, 178), (44, 44)),
        ((178, 218), (44, 30)),
        ((250, 31), (30, 7)),
        ((7, 500), (33, 64)),
        ((3, 5), (48, 20)),
        ((2, 2), (64, 3)),
        ((1, 2000), (5, 64)),
        ((1, 1), (3, 7)),
    ],
)
def test_a_ramp_keeps_its_place(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """On a plane, bicubic weights and an area's mean agree away from the borders."""
    row, column = np.mgrid[: size[0], : size[1]] + 0.5
    plane = 20 + 100 * row / size[0] + 100 * column / size[1]
    images = np.repeat(np.rint(plane).astype(np.uint8)[None, :, :, None], 3, axis=3)
    fitted = fit_to_grid(images, grid)
    assert fitted.shape == (1, *grid, 3)
    far = np.abs(fitted[0, :, :, 0] - area_means(images[0, :, :, 0].astype(float), grid))
    assert far.max() <= 200 / min(size) + 2
    assert far.mean() <= 50 / min(size) + 1


sizes = st.integers(2, 150)


@given(st.tuples(sizes, sizes), st.tuples(st.integers(2, 64), st.integers(2, 64)))
def test_every_size_is_brought_to_every_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    images = np.full((1, *size, 3), 77, dtype=np.uint8)
    assert np.array_equal(fit_to_grid(images, grid), np.full((1, *grid, 3), 77))


def test_square_sizes_are_brought_to_square_grids() -> None:
    for grid in range(2, 65):
        for side in range(2 + grid % 5, 513, 37):
            images = np.full((1, side, side, 3), 77, dtype=np.uint8)
            assert (fit_to_grid(images, (grid, grid)) == 77).all()


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(0, 40), st.booleans())
def test_blocks_of_a_crop_are_averaged(
    rows: int, columns: int, side: int, more: int, taller: bool
) -> None:
    size = (side * rows + more * taller, side * columns + more * (not taller))
    images = random_images(2, *size, 3)
    top, left = (size[0] - side * rows) // 2, (size[1] - side * columns) // 2
    kept = images[:, top : top + side * rows, left : left + side * columns].astype(int)
    total = kept.reshape(2, rows, side, columns, side, 3).sum(axis=(2, 4))
    means = (2 * total + side * side) // (2 * side * side)  # halves up
    assert np.array_equal(fit_to_grid(images, (rows, columns)), means)
