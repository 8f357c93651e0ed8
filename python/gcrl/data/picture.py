"""One picture in a file: which formats are read, and how it becomes pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from gcrl.data.budget import Budget
from gcrl.data.dataset import DataError
from gcrl.data.metadata import without_metadata
from gcrl.data.resize import fit_to_grid

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow's names
EXTENSIONS = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
# Bytes per pixel while a picture is decoded, at most: as stored, in RGB, and as bytes twice.
PIXEL_BYTES = 20
WEBP_PIXEL_BYTES = 28  # its decoder has two canvases of its own
ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """A picture on the grid, and what of its file is not in it."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    was_transparent: bool
    was_animated: bool


@contextmanager
def decoding(budget: Budget) -> Iterator[None]:
    """Within it Pillow's own limit is the budget's, and its warnings are not shown."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        Image.MAX_IMAGE_PIXELS = max(1, budget.limit // PIXEL_BYTES)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_picture(file: Path, grid: tuple[int, int], budget: Budget) -> Picture:
    """Read the first picture of a file, turned upright, on the grid.

    Damaged metadata is passed over. Raises DataError, naming the file, where the pixels are
    damaged, the format is none of FORMATS, or decoding would take more than the budget.
    """
    try:
        return _read_what_is_sound(file, grid, budget)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{file}: cannot be read as an image: would take more memory than {budget}"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{file}: cannot be read as an image: expected {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # decoders raise what they like on damaged files
        reason = str(error) or type(error).__name__
        raise DataError(f"{file}: cannot be read as an image: {reason}") from error


def _read_what_is_sound(file: Path, grid: tuple[int, int], budget: Budget) -> Picture:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            return _read(stream, size, grid, budget)
    except (DataError, Image.DecompressionBombError):
        raise
    except Exception:
        with budget.lend(3 * size):
            bare = without_metadata(file.read_bytes())
        if bare is None:
            raise
        return _read(io.BytesIO(bare), 2 * len(bare), grid, budget)


def _read(stream: BinaryIO, size: int, grid: tuple[int, int], budget: Budget) -> Picture:
    """`size`: the bytes that the file itself takes while it is decoded."""
    image = Image.open(stream, formats=FORMATS)
    pixels = max(image.width * image.height, _tile_pixels(image))
    with budget.lend(size + pixels * _pixel_bytes(image)):
        try:
            return _decode(image, grid)
        finally:
            image.close()  # within the loan, as it frees the pixels


def _decode(image: ImageFile, grid: tuple[int, int]) -> Picture:
    image.load()
    rgb, was_transparent = _upright_rgb(image)
    fitted = fit_to_grid(rgb[np.newaxis], grid)[0]
    return Picture(fitted, was_transparent, _is_animated(image))


def _pixel_bytes(image: Image.Image) -> int:
    return WEBP_PIXEL_BYTES if image.format == "WEBP" else PIXEL_BYTES


def _tile_pixels(image: Image.Image) -> int:
    """A TIFF's tile is decoded whole, and may be larger than the picture."""
    tags: Any = getattr(image, "tag_v2", {})
    sides = (tags.get(322, 0), tags.get(323, 0))
    return sides[0] * sides[1] if all(isinstance(side, int) for side in sides) else 0


def _is_animated(image: Image.Image) -> bool:
    if image.format == "MPO":  # a photograph, with previews behind it
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the pictures behind the first are damaged
        return True


def _upright_rgb(image: Image.Image) -> tuple[np.ndarray, bool]:
    """uint8 [h, w, 3], and whether transparency was dropped."""
    try:
        turn = TRANSPOSE.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged tag says nothing
        turn = None
    was_transparent = False
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        lowest = rgba.getchannel("A").getextrema()[0]
        was_transparent = lowest < 255  # type: ignore[operator]
        rgb = rgba.convert("RGB")
    elif image.mode.startswith("I;16"):
        high = np.asarray(image) >> 8
        rgb = Image.fromarray(high.astype(np.uint8)).convert("RGB")
    elif image.mode in ("I", "F"):
        raise DataError(f"expected 8 or 16 bits a channel, got mode {image.mode}")
    else:
        rgb = image.convert("RGB")
    return np.asarray(rgb if turn is None else rgb.transpose(turn)), was_transparent
