"""Two views of an image: a weak one, whose pixels are predicted, and a strong one beside it."""

from __future__ import annotations

from functools import lru_cache

import torch
from kornia import augmentation
from torch import nn

from gcrl.config import ViewsConfig

ASPECT = (3 / 4, 4 / 3)  # by which a crop's aspect ratio may differ from the grid's
JITTER_PROBABILITY = 0.8
BLUR_SIGMA = (0.1, 2.0)  # pixels


def make_views(images: torch.Tensor, config: ViewsConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a weak and a strong view of each image, or two strong ones, from torch's generator.

    images uint8 [B, H, W, 3]. Returns (weak uint8, strong float32), both [B, H, W, 3] in 0..255 on
    the images' device. Raises ValueError for other images, for settings that leave both views the
    same, and as `validate` does.
    """
    check_pair(config)
    return first_view(images, config), strong_view(images, config)


def first_view(images: torch.Tensor, config: ViewsConfig) -> torch.Tensor:
    """The weak view, or with `two_strong` another strong one."""
    return (strong_view if config.two_strong else weak_view)(images, config)


def weak_view(images: torch.Tensor, config: ViewsConfig) -> torch.Tensor:
    """Shift each image by whole pixels (reflected at the border) and perhaps flip it: one gather.

    Takes and returns uint8 [B, H, W, 3]. Never resampled, so that its pixels keep the density that
    test images are scored under.
    """
    _check(images, config)
    count, height, width, _ = images.shape
    device = images.device
    reach = config.weak_shift
    shift = torch.randint(-reach, reach + 1, (2, count, 1), device=device)
    rows = _reflect(torch.arange(height, device=device) + shift[0], height)  # [B, H]
    columns = _reflect(torch.arange(width, device=device) + shift[1], width)  # [B, W]
    if config.flip:
        flipped = torch.rand(count, 1, device=device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    batch = torch.arange(count, device=device)
    return images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def strong_view(images: torch.Tensor, config: ViewsConfig) -> torch.Tensor:
    """SimCLR's augmentation (Chen et al. 2020, appendix A) of images uint8 [B, H, W, 3].

    Returns float32 [B, H, W, 3] in 0..255. Every image has its own draws; the order of the jitter's
    four steps alone is the batch's.
    """
    grid = _check(images, config)
    augment = _strong_augmentation(config, grid)
    scaled = images.permute(0, 3, 1, 2).float() / 255  # [B, 3, H, W]
    return (augment(scaled) * 255).clamp(0, 255).permute(0, 2, 3, 1).contiguous()


def validate(config: ViewsConfig, grid: tuple[int, int]) -> None:
    """Raise ValueError, naming the field, for a setting that has no meaning on this grid."""
    height, width = grid
    side = min(grid)
    if not 0 <= config.weak_shift < side:
        raise ValueError(
            f"weak_shift: expected 0 to {side - 1} pixels on a grid of {height}x{width}, "
            f"got {config.weak_shift}"
        )
    smallest, largest = config.crop_scale
    if not 0 < smallest <= largest <= 1:
        raise ValueError(
            f"crop_scale: expected two shares, 0 < from <= to <= 1, got {config.crop_scale}"
        )
    if smallest * height * width < 1:
        raise ValueError(
            f"crop_scale: {smallest} of a grid of {height}x{width} is less than one pixel"
        )
    if not 0 <= config.color_jitter <= 2.5:
        raise ValueError(
            "color_jitter: expected 0 to 2.5 (hue turns by up to 0.2 times that, and 0.5 is half "
            f"the circle), got {config.color_jitter}"
        )
    for name in ("grayscale", "blur"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: expected a probability, 0 to 1, got {getattr(config, name)}")
    if config.blur > 0 and _blur_kernel(grid) > side:
        raise ValueError(
            f"blur: its kernel of {_blur_kernel(grid)} pixels is larger than a grid of "
            f"{height}x{width}"
        )


def differ(config: ViewsConfig) -> bool:
    """Whether there is anything by which the two views of an image can differ."""
    strong_changes = (
        config.crop_scale[0] < 1 or config.color_jitter or config.grayscale or config.blur
    )
    return bool(strong_changes or config.weak_shift or config.flip)


def check_pair(config: ViewsConfig) -> None:
    """Raise ValueError unless the two views of an image can differ."""
    if not differ(config):
        raise ValueError(
            "weak_shift, flip, crop_scale, color_jitter, grayscale, blur: expected one at least to "
            "change the image, got two views that are always the same"
        )


def _check(images: torch.Tensor, config: ViewsConfig) -> tuple[int, int]:
    """The grid of the images, on which the settings have a meaning."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images: expected uint8 [B, H, W, 3], got {images.dtype} {[*images.shape]}"
        )
    grid = (images.shape[1], images.shape[2])
    validate(config, grid)
    return grid


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Mirror indices beyond 0..size-1 at the border pixels, which are not repeated."""
    last = size - 1
    return last - (last - index.abs()).abs()


@lru_cache(maxsize=8)
def _strong_augmentation(config: ViewsConfig, grid: tuple[int, int]) -> nn.Module:
    height, width = grid
    steps: list[nn.Module] = []
    if config.crop_scale != (1.0, 1.0):
        ratio = (ASPECT[0] * width / height, ASPECT[1] * width / height)
        steps.append(
            augmentation.RandomResizedCrop(
                grid, scale=config.crop_scale, ratio=ratio, cropping_mode="resample"
            )
        )
    if config.flip:
        steps.append(augmentation.RandomHorizontalFlip(p=0.5))
    if config.color_jitter:
        strength = config.color_jitter
        levels = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        steps.append(augmentation.ColorJitter(*levels, p=JITTER_PROBABILITY))
    if config.grayscale:
        steps.append(augmentation.RandomGrayscale(p=config.grayscale))
    if config.blur:
        kernel = _blur_kernel(grid)
        steps.append(augmentation.RandomGaussianBlur((kernel, kernel), BLUR_SIGMA, p=config.blur))
    return nn.Sequential(*steps)


def _blur_kernel(grid: tuple[int, int]) -> int:
    """About a tenth of the image's side, odd, and 3 at least."""
    return max(3, min(grid) // 20 * 2 + 1)
