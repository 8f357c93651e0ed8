"""The colours that pixels are predicted among."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from gcrl_kernels import fit_palette, quantize_colors

FIT_PIXELS = 1 << 20  # pixels that a palette is fitted on, at most


def load_palette(path: str | Path, *, rescale: bool = True) -> torch.Tensor:
    """Read a palette, numbers [K, 3] in an .npy file, as float32 [K, 3] in 0..255.

    The units are told by the range: floats below 0 mean [-1, 1] (OpenAI's palette of iGPT), floats
    up to 1 mean [0, 1], all else 0..255. Without `rescale` they are 0..255, as `save_palette`
    writes them. Raises ValueError, naming the file, if it is no palette.
    """
    path = Path(path)
    try:
        colors = np.load(
            path, mmap_mode="r", allow_pickle=False
        )  # mapped: never larger than the file
    except Exception as error:  # a damaged file fails in numpy or below, each its own way
        raise ValueError(f"{path}: cannot be read as an .npy file: {error}") from error
    if not isinstance(colors, np.ndarray) or colors.dtype.kind not in "iuf":
        got = colors.dtype if isinstance(colors, np.ndarray) else "several arrays"
        raise ValueError(f"{path}: expected an array of numbers [K, 3], got {got}")
    if colors.ndim != 2 or colors.shape[1] != 3 or len(colors) < 2:
        raise ValueError(
            f"{path}: expected [K, 3] with at least 2 colours, got {list(colors.shape)}"
        )
    if not np.isfinite(colors).all():
        raise ValueError(f"{path}: expected finite numbers, got NaN or infinity")
    scaled = _to_bytes_range(colors, path) if rescale else colors
    return torch.from_numpy(scaled.astype(np.float32))


def _to_bytes_range(colors: np.ndarray, path: Path) -> np.ndarray:
    """Colours in [-1, 1], [0, 1] or 0..255 -> 0..255."""
    low, high = colors.min(), colors.max()
    floating = colors.dtype.kind == "f"
    if floating and -1 <= low < 0 and high <= 1:
        return (colors.astype(np.float64) + 1) * 127.5
    if low < 0 or high > 255:
        raise ValueError(
            f"{path}: expected colours in [-1, 1], [0, 1] or 0..255, got {low} to {high}"
        )
    return colors.astype(np.float64) * 255 if floating and high <= 1 else colors


def save_palette(path: str | Path, palette: torch.Tensor) -> None:
    """Write a palette, [K, 3] in 0..255, as float32 .npy: whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            np.save(out, palette.detach().cpu().float().numpy())
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fit(
    images: np.ndarray | torch.Tensor, colors: int, seed: int = 0, progress: bool = False
) -> torch.Tensor:
    """Fit `colors` colours to images uint8 [N, H, W, 3] by k-means: float32 [colors, 3], 0..255.

    About a million pixels at most are looked at, drawn by the seed. Raises ValueError where there
    are fewer pixels than colours.
    """
    pixels = torch.as_tensor(images).reshape(-1, 3)
    if len(pixels) > FIT_PIXELS:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(pixels), (FIT_PIXELS,), generator=generator)
        pixels = pixels[chosen.to(pixels.device)]
    return fit_palette(pixels, colors, seed=seed, progress=progress)


def to_tokens(images: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    """The nearest colour of palette [K, 3] to each of images [..., 3], in 0..255: int64 [...]."""
    return quantize_colors(images, palette.to(images.device))


def to_rgb(tokens: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    """tokens int64 [...] -> their colours in palette [K, 3] in 0..255, uint8 [..., 3]."""
    colors = palette.to(tokens.device).round().clamp(0, 255).to(torch.uint8)
    return colors[tokens]
