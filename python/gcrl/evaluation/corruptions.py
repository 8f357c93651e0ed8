"""Fourteen of the fifteen corruptions of Hendrycks and Dietterich 2019, arXiv 1903.12261.

Written from the published definitions, with the severities that were published for 32x32 pixels;
lengths are in pixels of the images as they are given. Frost is missing: it blends photographs of
frozen glass in. Each function takes images float64 [N, H, W, 3] in 0..1, the severity's parameters
and a generator, and returns as many; what it returns may leave 0..1 and is clipped.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

SEVERITIES = (1, 2, 3, 4, 5)
MISSING = ("frost",)

Corruption = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]


def corrupt(images: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Images uint8 [N, H, W, 3], corrupted: the same for the same seed, uint8 [N, H, W, 3].

    Raises ValueError for an unknown name or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"name: expected one of {', '.join(CORRUPTIONS)}, got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected 1 to 5, got {severity!r}")
    function, parameters = CORRUPTIONS[name]
    rng = np.random.default_rng((seed, list(CORRUPTIONS).index(name), severity))
    changed = function(images / 255.0, parameters[severity - 1], rng)
    return np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return x + deviation * rng.standard_normal(x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """Poisson noise of so many photons at white."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper, in each channel on its own."""
    salt = (rng.random(x.shape) < 0.5).astype(float)
    return np.where(rng.random(x.shape) < share, salt, x)


def defocus_blur(x: np.ndarray, size: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A disk of some radius, its edge smoothed by a Gaussian of some deviation."""
    radius, deviation = size
    reach = 8 if radius <= 8 else math.ceil(radius)
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(float)
    disk = _gaussian(disk / disk.sum(), deviation, 1, axes=(0, 1))
    return _convolve(x, disk / disk.sum())


def glass_blur(
    x: np.ndarray, shape: tuple[float, int, int], rng: np.random.Generator
) -> np.ndarray:
    """Each pixel becomes one within a reach above and left, some times over; blurred around it."""
    deviation, reach, times = shape
    x = _gaussian(x, deviation)
    count, height, width, _ = x.shape
    every = np.arange(count)[:, None, None]
    for _ in range(times):
        rows, columns = rng.integers(-reach, reach, (2, count, height, width))
        rows = np.clip(rows + np.arange(height)[:, None], 0, height - 1)
        columns = np.clip(columns + np.arange(width), 0, width - 1)
        x = x[every, rows, columns]
    return _gaussian(x, deviation)


def motion_blur(x: np.ndarray, size: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """Along a line at a random angle of up to 45 degrees."""
    radius, deviation = size
    return _along_a_line(x, radius, deviation, rng.uniform(-45, 45, len(x)))


def zoom_blur(x: np.ndarray, largest: float, rng: np.random.Generator) -> np.ndarray:
    """The mean of the image and its enlargements, in steps of 0.01."""
    factors = np.arange(1, largest, 0.01)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(x: np.ndarray, shape: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Flakes that fall at an angle, seen twice, over an image whitened in its greys."""
    mean, deviation, zoom, threshold, radius, blur, kept = shape
    flakes = rng.normal(mean, deviation, x.shape[:3])
    flakes = _zoom(flakes, zoom)
    flakes[flakes < threshold] = 0
    flakes = np.clip(flakes, 0, 1)
    angles = rng.uniform(-135, -45, len(x))
    layer = _along_a_line(flakes[..., None], int(radius), blur, angles)
    grey = (x @ (0.299, 0.587, 0.114))[..., None]
    whitened = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return whitened + layer + layer[:, ::-1, ::-1]


def fog(x: np.ndarray, shape: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A cloud of fractal noise, of some strength and roughness, over a paler image."""
    strength, decay = shape
    height, width = x.shape[1:3]
    cloud = _plasma(len(x), max(height, width), decay, rng)[:, :height, :width, None]
    white = x.max((1, 2, 3), keepdims=True)
    return (x + strength * cloud) * white / (white + strength)


def brightness(x: np.ndarray, added: float, rng: np.random.Generator) -> np.ndarray:
    """Added to the value of HSV: hue and saturation stay as they are."""
    value = x.max(-1, keepdims=True)
    brighter = np.clip(value + added, 0, 1)
    # Black has no hue: it becomes grey.
    return np.where(value > 0, x / np.maximum(value, 1e-12) * brighter, brighter)


def contrast(x: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * factor + mean


def elastic(x: np.ndarray, shape: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """A random affine map, then a smooth random displacement; all in parts of the side."""
    count, height, width, _ = x.shape
    strength, smoothness, reach = (part * height for part in shape)
    rows, columns = np.mgrid[:height, :width].astype(float)
    third = min(height, width) // 3
    corners = np.array([[1, 1], [1, -1], [-1, -1]]) * third + (height // 2, width // 2)
    out = np.empty_like(x)
    for index in range(count):
        moved = corners + rng.uniform(-reach, reach, (3, 2))
        to_source = np.linalg.solve(np.c_[moved, np.ones(3)], corners.astype(float))  # [3, 2]
        source = np.stack((rows, columns, np.ones_like(rows)), -1) @ to_source
        for axis in range(2):
            noise = rng.uniform(-1, 1, (height, width))
            source[..., axis] += strength * ndimage.gaussian_filter(
                noise, smoothness, mode="reflect", truncate=3
            )
        for channel in range(3):
            out[index, ..., channel] = ndimage.map_coordinates(
                x[index, ..., channel], source.transpose(2, 0, 1), order=1, mode="mirror"
            )
    return out


def pixelate(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Made smaller to this share of its side, and large again in blocks."""
    height, width = x.shape[1:3]
    small = (max(1, int(width * share)), max(1, int(height * share)))

    def change(image: Image.Image) -> Image.Image:
        reduced = image.resize(small, Image.Resampling.BOX)
        return reduced.resize((width, height), Image.Resampling.NEAREST)

    return _through_pillow(x, change)


def jpeg_compression(x: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    def change(image: Image.Image) -> Image.Image:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality)
        return Image.open(content, formats=("JPEG",))

    return _through_pillow(x, change)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic,
        (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}
"""Each with its parameters at the severities 1 to 5."""


def _gaussian(
    x: np.ndarray, deviation: float, reach: int | None = None, axes: tuple[int, int] = (1, 2)
) -> np.ndarray:
    """Blurred along two axes, to a reach in pixels or to four deviations."""
    return ndimage.gaussian_filter(x, deviation, axes=axes, radius=reach, mode="nearest")


def _convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] with one kernel [k, k], mirrored at the border."""
    return ndimage.convolve(x, kernel[None, :, :, None], mode="mirror")


def _along_a_line(x: np.ndarray, radius: int, deviation: float, angles: np.ndarray) -> np.ndarray:
    """Each image [H, W, C] blurred in its direction (degrees), ahead; border pixels repeat."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / deviation) ** 2)
    weights /= weights.sum()
    height, width = x.shape[1:3]
    rows, columns, every = np.arange(height), np.arange(width), np.arange(len(x))
    out = np.zeros_like(x)
    for step, weight in zip(steps, weights, strict=True):
        down = np.rint(step * np.sin(np.radians(angles))).astype(int)
        right = np.rint(step * np.cos(np.radians(angles))).astype(int)
        from_rows = np.clip(rows + down[:, None], 0, height - 1)
        from_columns = np.clip(columns + right[:, None], 0, width - 1)
        out += weight * x[every[:, None, None], from_rows[:, :, None], from_columns[:, None, :]]
    return out


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of images [N, H, W, ...] enlarged by a factor, linearly, to the same size."""
    if factor == 1:
        return x.copy()
    coordinates = []
    for size in x.shape[1:3]:
        middle = (size - 1) / 2
        coordinates.append(np.clip(middle + (np.arange(size) - middle) / factor, 0, size - 1))
    for axis, places in enumerate(coordinates, 1):
        below = np.minimum(np.floor(places).astype(int), x.shape[axis] - 2)
        shape = [1] * x.ndim
        shape[axis] = -1
        share = (places - below).reshape(shape)
        x = (1 - share) * np.take(x, below, axis) + share * np.take(x, below + 1, axis)
    return x


def _plasma(count: int, size: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Fractal noise by diamond and square on a torus, [count, s, s] in 0..1, s >= size.

    The wobble falls by decay^2 a level, as the published one does, which is drawn from +-w and
    multiplied by w, where w falls by decay.
    """
    side = 2 ** math.ceil(math.log2(size))
    cloud = np.zeros((count, side, side))
    step, wobble = side, 100.0

    def around(places: tuple[slice, slice], *neighbours: np.ndarray) -> None:
        mean = np.mean(neighbours, axis=0)
        cloud[(slice(None), *places)] = mean + wobble * rng.uniform(-1, 1, mean.shape)

    while step >= 2:
        half = step // 2
        corners = cloud[:, ::step, ::step]
        below, right = np.roll(corners, -1, 1), np.roll(corners, -1, 2)
        middle, edge = slice(half, None, step), slice(None, None, step)
        around((middle, middle), corners, below, right, np.roll(below, -1, 2))
        centres = cloud[:, middle, middle]
        around((edge, middle), corners, right, centres, np.roll(centres, 1, 1))
        around((middle, edge), corners, below, centres, np.roll(centres, 1, 2))
        step, wobble = half, wobble / decay**2
    cloud -= cloud.min((1, 2), keepdims=True)
    return cloud / np.maximum(cloud.max((1, 2), keepdims=True), 1e-12)


def _through_pillow(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    pixels = np.rint(x * 255).astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels]) / 255.0
