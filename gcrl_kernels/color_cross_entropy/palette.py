"""A palette of colours, fitted by k-means on the nearest-colour kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gcrl_kernels import checks
from gcrl_kernels.backends import choose

SEEDING_PIXELS = 65_536  # k-means++ looks at no more pixels than this
TOLERANCE = 1e-5  # stop when an iteration improves the inertia by a smaller share


def fit_palette(
    pixels: Tensor,
    colors: int,
    *,
    seed: int = 0,
    iterations: int = 100,
    backend: str | None = None,
    progress: bool = False,
) -> Tensor:
    """Fit colours to pixels by k-means: Lloyd's iterations from a k-means++ start.

    k-means++ is Arthur and Vassilvitskii 2007.

    Args:
        pixels: [..., 3], uint8 or floating point, finite; at least `colors` of them.
        colors: how many colours, at least 1.
        seed: of the start, an integer of 64 bits; the same seed, pixels and device give the same
            palette, bit for bit.
        iterations: Lloyd iterations at most; fewer where the inertia stops falling.
        backend: of `quantize_colors`.
        progress: show a bar (if tqdm is installed).

    Returns:
        float32 [colors, 3], in the units of `pixels`, on their device; darkest colour first. A
        colour that no pixel is nearest to is moved to the pixels that are farthest from theirs.

    Raises:
        TypeError, ValueError: an argument of another type, dtype or shape than stated; NaN or
            infinite pixels.
    """
    check_pixels(pixels)
    colors = checks.at_least("colors", checks.integer("colors", colors), 1)
    iterations = checks.at_least("iterations", checks.integer("iterations", iterations), 0)
    seed = checks.integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise checks.value_error("seed", "an integer of 64 bits", seed)
    checks.check_flag("progress", progress)
    if pixels.is_meta or isinstance(pixels, FakeTensor):
        raise checks.type_error("pixels", "a tensor with values", f"a {type(pixels).__name__}")
    choose("quantize_colors", backend, pixels)
    flat = pixels.detach().reshape(-1, 3)
    if len(flat) < colors:
        raise checks.value_error(
            "pixels", f"at least as many as colors ({colors})", f"{len(flat)} pixels"
        )
    if flat.is_floating_point() and not bool(flat.isfinite().all()):
        raise checks.value_error("pixels", "finite values", "NaN or infinity")
    palette = _lloyd(flat, _seed(flat, colors, seed), iterations, backend, progress)
    return palette[palette.sum(1).argsort(stable=True)]


def check_pixels(pixels: Tensor, name: str = "pixels") -> None:
    """Raise unless pixels are [..., 3], uint8 or floating point."""
    checks.check_dtype(
        name, pixels, (torch.uint8, *checks.FLOATS), "a uint8 or floating-point tensor"
    )
    if pixels.dim() == 0 or pixels.shape[-1] != 3:
        raise checks.value_error(name, "[..., 3] (red, green, blue)", checks.shape(pixels))


def _seed(pixels: Tensor, colors: int, seed: int) -> Tensor:
    """k-means++: a further colour is a pixel drawn by its squared distance from those before.

    Of several that are drawn, the one that leaves the least inertia.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pixels), generator=generator)[: max(SEEDING_PIXELS, colors)]
    sample = pixels[chosen.to(pixels.device)].float().T.contiguous()  # [3, n]
    trials = 2 + int(math.log(colors))  # as many as scikit-learn draws
    draws = torch.rand(colors, trials, generator=generator).to(pixels.device)
    palette = sample[:, :1]
    distance = (sample - palette).square().sum(0)  # [n]
    for draw in draws[1:]:
        cumulative = distance.cumsum(0, dtype=torch.float64)
        # With fewer distinct pixels than colours every distance ends at zero: the first pixel then
        # repeats.
        index = torch.searchsorted(cumulative, cumulative[-1] * draw.double(), right=True)
        drawn = sample[:, index.clamp_max(len(distance) - 1)]  # [3, trials]
        left = torch.minimum(_squared_distances(drawn, sample), distance)  # [trials, n]
        best = left.sum(1).argmin()
        distance = left[best]
        palette = torch.cat([palette, drawn[:, best, None]], 1)
    return palette.T.contiguous()


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Between columns of [3, m] and [3, n]: [m, n]."""
    total = (first[0, :, None] - second[0]).square_()
    for channel in (1, 2):
        difference = first[channel, :, None] - second[channel]
        total.addcmul_(difference, difference)
    return total


def _lloyd(
    pixels: Tensor, palette: Tensor, iterations: int, backend: str | None, progress: bool
) -> Tensor:
    from gcrl_kernels.color_cross_entropy import quantize_colors

    values = pixels.float()
    (channels, unit), squares = _fixed_point(values.T), float(values.double().square().sum())
    previous = torch.inf
    for _ in _iterate(iterations, progress):
        nearest = quantize_colors(values, palette, backend=backend)
        count = torch.bincount(nearest, minlength=len(palette)).double()
        total = torch.stack(
            [torch.bincount(nearest, weights, len(palette)) for weights in channels], 1
        ).mul_(unit)
        # |x - c|² over a colour's pixels, from their sums alone
        center = palette.double()
        inertia = squares + float((count[:, None] * center.square() - 2 * total * center).sum())
        if inertia >= previous * (1 - TOLERANCE):
            break
        previous = inertia
        mean = (total / count.clamp_min(1)[:, None]).float()
        empty = count == 0
        if bool(empty.any()):
            error = (values - palette[nearest]).square().sum(1)
            mean[empty] = values[error.topk(int(empty.sum())).indices]
            previous = torch.inf
        palette = mean
    return palette


def _fixed_point(values: Tensor) -> tuple[Tensor, float]:
    """As whole multiples of a unit, float64, whose sums are exact: the same in any order."""
    largest = max(float(values.abs().max()), 1e-30)
    unit = 2.0 ** (math.frexp(largest)[1] + math.frexp(len(values[0]))[1] - 52)
    return (values.double() / unit).round_().contiguous(), unit


def _iterate(iterations: int, progress: bool) -> range:
    if not progress:
        return range(iterations)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return range(iterations)
    return tqdm(range(iterations), desc="palette", unit="iteration", leave=False, delay=1)
