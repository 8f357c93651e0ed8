"""Images of any size, brought to the grid of a model."""

from __future__ import annotations

import numpy as np
from PIL import Image

CHUNK = 1 << 22  # bytes of images that are averaged at a time, which bounds their sums' memory


def fit_to_grid(images: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The same images at the size of the grid.

    images uint8 [N, h, w, 3]; grid (H, W). Returns uint8 [N, H, W, 3]. The largest centred part of
    the grid's aspect ratio is kept. Where the grid divides it, a pixel is the rounded mean of its
    block; elsewhere it is resampled (antialiased bicubic). Raises ValueError for other input.
    """
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
        or 0 in images.shape[1:]
    ):
        raise ValueError(
            f"images: expected uint8 [N, height, width, 3], got {images.dtype} {list(images.shape)}"
        )
    if min(grid) < 1:
        raise ValueError(f"grid: expected positive height and width, got {grid}")
    height, width = images.shape[1:3]
    if (height, width) == tuple(grid):
        return images
    left, top, _, bottom = box = centred_part((height, width), grid)
    side = (bottom - top) / grid[0]  # of the block that becomes a pixel
    if side.is_integer():
        rows = slice(int(top), int(top) + int(side) * grid[0])
        columns = slice(int(left), int(left) + int(side) * grid[1])
        return _average_blocks(images[:, rows, columns], int(side))
    return _resample(images, grid, box)


def centred_part(size: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred part of an image (h, w) with the grid's aspect ratio.

    Returns (left, top, right, bottom). One side is kept whole and the other is one division of
    integers, so that rounding never puts an edge outside the image.
    """
    height, width = size
    if height * grid[1] <= width * grid[0]:
        kept = height * grid[1] / grid[0]
        left = (width - kept) / 2
        return left, 0.0, left + kept, float(height)
    kept = width * grid[0] / grid[1]
    top = (height - kept) / 2
    return 0.0, top, float(width), top + kept


def _average_blocks(images: np.ndarray, side: int) -> np.ndarray:
    """The mean of each block of side x side pixels, halves rounded up."""
    count, height, width, _ = images.shape
    rows, columns = height // side, width // side
    out = np.empty((count, rows, columns, 3), dtype=np.uint8)
    step = max(1, CHUNK // (height * width * 3))
    for start in range(0, count, step):
        chunk = images[start : start + step].reshape(-1, rows, side, width, 3)
        total = chunk.sum(axis=2, dtype=np.uint64).reshape(-1, rows, columns, side, 3).sum(axis=3)
        out[start : start + step] = (total + side * side // 2) // (side * side)
    return out


def _resample(
    images: np.ndarray, grid: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    out = np.empty((len(images), *grid, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        resized = Image.fromarray(image).resize(
            (grid[1], grid[0]), resample=Image.Resampling.BICUBIC, box=box
        )
        out[index] = np.asarray(resized)
    return out
