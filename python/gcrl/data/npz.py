"""Images in an .npz file."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from gcrl.data.budget import Budget
from gcrl.data.dataset import DataError, Dataset, ImageSet, hold_out
from gcrl.data.picture import PIXEL_BYTES
from gcrl.data.resize import fit_to_grid

NAMES = ("images", "labels", "test_images", "test_labels")
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
HEADER = 1 << 14  # bytes that an .npy header takes, at most
CHUNK = 1 << 23  # bytes of images that are resized at a time
PIECE = 1 << 18  # bytes that are unpacked at a time


def load(path: Path, grid: tuple[int, int], seed: int) -> Dataset:
    """Read `images` and optional `labels`, and `test_images` with optional `test_labels`.

    Images are uint8 [N, h, w, 3], or [N, h, w] if grey; labels are integers [N]. Without
    test_images a fifth is held out by the seed. Images are resized as they are unpacked: what
    takes memory is the images on the grid. Raises DataError, naming the file.
    """
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not an .npz file, or it is cut short")
    budget = Budget()
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _find(archive)
            train = _image_set(arrays, "", grid, budget)
            if "test_images" in arrays:
                test = _image_set(arrays, "test_", grid, budget)
                if (train.labels is None) != (test.labels is None):
                    raise DataError("expected 'labels' and 'test_labels' both, or neither")
            elif "test_labels" in arrays:
                raise DataError("has 'test_labels' but no 'test_images'")
            else:
                train, test = hold_out(train, seed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # a damaged archive fails in zipfile or below, each its own way
        raise DataError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error
    return Dataset(path.stem, train, test, None)


@dataclass(frozen=True)
class _Stored:
    """An array in the archive; its header is read, its values are not."""

    archive: zipfile.ZipFile
    member: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool  # in Fortran's order
    start: int  # of the values, in bytes

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, step: int) -> Iterator[np.ndarray]:
        """The array in blocks of `step` along its first axis; the checksum is compared at last."""
        count, row = self.shape[0], self.size // max(1, self.shape[0])
        with self.archive.open(self.member) as stream:
            _unpack(stream, self.start)
            if self.by_columns:
                whole = _unpack(stream, self.size).view(self.dtype).reshape(self.shape, order="F")
                for start in range(0, count, step):
                    yield np.ascontiguousarray(whole[start : start + step])
                return
            for start in range(0, count, step):
                size = min(step, count - start)
                values = _unpack(stream, size * row).view(self.dtype)
                yield values.reshape(size, *self.shape[1:])


def _find(archive: zipfile.ZipFile) -> dict[str, _Stored]:
    """The arrays that are ours; of the others nothing is read."""
    members = {member.filename: member for member in archive.infolist()}
    arrays = {}
    for name in NAMES:
        if f"{name}.npy" in members:
            arrays[name] = _read_header(archive, members[f"{name}.npy"], name)
        elif name in members:
            raise DataError(f"'{name}': expected an array, {name}.npy, got another file")
    if "images" not in arrays:
        names = [name.removesuffix(".npy") for name in members]
        raise DataError(f"expected an array 'images', got {names[:10]}")
    return arrays


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> _Stored:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"'{name}': compressed in another way than NumPy does")
    with archive.open(member) as stream:
        head = io.BytesIO(stream.read(HEADER))
    try:
        version = np.lib.format.read_magic(head)
        if version not in HEADER_READERS:
            raise ValueError(f"version {version} of the format holds other than numbers")
        shape, by_columns, dtype = HEADER_READERS[version](head)
    except Exception as error:  # NumPy parses the header as Python
        raise DataError(f"'{name}': expected an array as NumPy writes it: {error}") from error
    if dtype.hasobject:
        raise DataError(f"'{name}': expected numbers, got Python objects, which are not read")
    array = _Stored(archive, member, shape, dtype, by_columns, head.tell())
    if min(shape, default=0) < 0 or array.size != member.file_size - array.start:
        raise DataError(f"'{name}': its values are not as many as {dtype} {list(shape)} needs")
    return array


def _unpack(stream: IO[bytes], size: int) -> np.ndarray:
    """So many bytes, uint8 [size]; in pieces, as zipfile is slow with large ones."""
    out = np.empty(size, dtype=np.uint8)
    done = 0
    while done < size:
        piece = stream.read(min(PIECE, size - done))
        if not piece:
            raise DataError("cannot be read: it ends within an array")
        out[done : done + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        done += len(piece)
    return out


def _image_set(
    arrays: dict[str, _Stored], prefix: str, grid: tuple[int, int], budget: Budget
) -> ImageSet:
    name = prefix + "images"
    stored = arrays[name]
    shape = stored.shape
    is_grey = len(shape) == 3
    if (
        stored.dtype != np.uint8
        or not (is_grey or (len(shape) == 4 and shape[3] == 3))
        or 0 in shape[1:]
    ):
        raise DataError(
            f"'{name}': expected uint8 [N, height, width, 3] or [N, height, width], "
            f"got {stored.dtype} {list(shape)}"
        )
    count, height, width = shape[:3]
    labels = arrays.get(prefix + "labels")
    numbers = None if labels is None else _labels(labels, prefix + "labels", count, budget)
    step = max(1, CHUNK // (height * width * 3))
    try:
        budget.keep(2 * count * grid[0] * grid[1] * 3)  # twice, as a part is held out
        resizing = min(step, count) * height * width * PIXEL_BYTES
        with budget.lend(resizing + stored.size * stored.by_columns):
            out = np.empty((count, *grid, 3), dtype=np.uint8)
            for index, images in enumerate(stored.blocks(step)):
                rgb = np.repeat(images[..., np.newaxis], 3, axis=3) if is_grey else images
                out[index * step : index * step + len(rgb)] = fit_to_grid(rgb, grid)
    except DataError as error:
        raise DataError(f"'{name}': {error}") from error
    return ImageSet(out, numbers)


def _labels(stored: _Stored, name: str, count: int, budget: Budget) -> np.ndarray:
    """int64 [count]."""
    if stored.dtype.kind not in "iu":
        raise DataError(f"'{name}': expected integers, got {stored.dtype}")
    if stored.shape != (count,):
        raise DataError(f"'{name}': expected one per image, [{count}], got {list(stored.shape)}")
    budget.keep(3 * 8 * count)
    blocks = list(stored.blocks(max(1, count)))
    labels = blocks[0].astype(np.int64) if blocks else np.empty(0, np.int64)
    if (labels < 0).any():
        raise DataError(f"'{name}': expected none below 0, got {labels.min()}")
    return labels
