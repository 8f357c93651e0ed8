"""The nearest palette colour: the search that the Triton kernels share, and the quantiser."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def infinity(DISTANCE: tl.constexpr):
    """Farther than any colour."""
    if tl.uint64 == DISTANCE:
        farthest = tl.full((), 0xFFFFFFFFFFFFFFFF, tl.uint64)
    else:
        farthest = tl.full((), float("inf"), DISTANCE)
    return farthest


@triton.jit
def square(pixel, color, DISTANCE: tl.constexpr):
    """Of the difference; that of integers is below 2^64 / 3, whatever the int32 palette."""
    if tl.uint64 == DISTANCE:
        difference = (pixel.to(tl.int64) - color.to(tl.int64)).to(tl.uint64, bitcast=True)
    else:
        difference = pixel.to(DISTANCE) - color.to(DISTANCE)
    return difference * difference


@triton.jit
def search(
    red,  # [ROWS] each
    green,
    blue,
    palette,  # [3, K]
    colors,
    DISTANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLORS: tl.constexpr,
):
    """The index of each pixel's nearest colour, the lowest of several: int32 [ROWS]; -1: none is at
    a finite distance.

    Each column keeps the nearest of every COLORS-th colour; the columns are compared once.
    """
    nowhere = infinity(DISTANCE)
    least = tl.zeros((ROWS, COLORS), DISTANCE) + nowhere
    index = tl.zeros((ROWS, COLORS), tl.int32)
    for first in range(0, colors, COLORS):
        color = first + tl.arange(0, COLORS)
        inside = color < colors
        where = palette + color
        distance = square(red[:, None], tl.load(where, inside, 0)[None, :], DISTANCE)
        where += colors
        distance += square(green[:, None], tl.load(where, inside, 0)[None, :], DISTANCE)
        where += colors
        distance += square(blue[:, None], tl.load(where, inside, 0)[None, :], DISTANCE)
        closer = (distance < least) & inside[None, :]
        least = tl.where(closer, distance, least)
        index = tl.where(closer, color[None, :], index)
    nearest = tl.min(least, 1)
    lowest = tl.min(tl.where(least == nearest[:, None], index, 0x7FFFFFFF), 1)
    if tl.uint64 != DISTANCE:
        lowest = tl.where(nearest == nowhere, -1, lowest)
    return lowest


@triton.jit
def is_exact_in_float32(palette, colors, COLORS: tl.constexpr):
    """Whether every distance of a uint8 pixel to an integer palette is below 2^24."""
    outside = tl.zeros((COLORS,), tl.int32)
    for first in range(0, 3 * colors, COLORS):
        place = first + tl.arange(0, COLORS)
        value = tl.load(palette + place, place < 3 * colors, 0)
        outside |= ((value < -2048) | (value > 2303)).to(tl.int32)
    return tl.max(outside, 0) == 0


@triton.jit
def nearest_color(
    pixels,  # [M, 3]
    palette,  # [3, K]
    row,  # int64 [ROWS]
    inside,  # bool [ROWS]
    colors,
    DISTANCE: tl.constexpr,  # tl.uint64: in integers, or in float32 where that is exact
    ROWS: tl.constexpr,
    COLORS: tl.constexpr,  # at a time
):
    """int32 [ROWS]; -1 for a pixel with a NaN, or so far from all colours that it overflows."""
    red = tl.load(pixels + 3 * row, inside, 0)
    green = tl.load(pixels + 3 * row + 1, inside, 0)
    blue = tl.load(pixels + 3 * row + 2, inside, 0)
    if tl.uint64 == DISTANCE:
        if is_exact_in_float32(palette, colors, COLORS):
            index = search(red, green, blue, palette, colors, tl.float32, ROWS, COLORS)
        else:
            index = search(red, green, blue, palette, colors, tl.uint64, ROWS, COLORS)
    else:
        index = search(red, green, blue, palette, colors, DISTANCE, ROWS, COLORS)
    return index


@triton.jit(do_not_specialize=["rows", "colors"])
def quantize_kernel(
    pixels,  # [M, 3]
    palette,  # [3, K]
    nearest,  # int64 [M]
    rows,
    colors,
    DISTANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLORS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = nearest_color(pixels, palette, row, row < rows, colors, DISTANCE, ROWS, COLORS)
    tl.store(nearest + row, index.to(tl.int64), row < rows)
