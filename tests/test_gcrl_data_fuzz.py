"""Damaged files of every kind: what comes is images, or an error that names the file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_gcrl_data_cifar10 import write_cifar10
from tiny_run import random_images

from gcrl.data import DataError, load_dataset, memory_limit

PICTURES = {
    "png": {},
    "jpg": {"quality": 90},
    "webp": {"lossless": True},
    "gif": {},
    "bmp": {},
    "tif": {"compression": "tiff_lzw"},
    "ppm": {},
}
KINDS = (*PICTURES, "npz", "npz-compressed", "pickle")
GIGABYTES = 0.2


def write_source(folder: Path, kind: str) -> tuple[Path, Path]:
    """A sound source of images: what is loaded, and the file that will be damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "pickle":
        batches, *_ = write_cifar10(folder, 3)
        return batches, batches / "data_batch_2"
    images = random_images(6, 24, 24, 3)
    if kind.startswith("npz"):
        save = np.savez_compressed if kind == "npz-compressed" else np.savez
        save(folder / "set.npz", images=images, labels=np.arange(6))
        return folder / "set.npz", folder / "set.npz"
    exif = Image.Exif()
    exif[0x0112] = 6
    for index, image in enumerate(images):
        options = {"exif": exif} if kind in ("png", "jpg", "webp") else {}
        name = folder / f"{index}.{kind}"
        Image.fromarray(image).save(name, **PICTURES[kind], **options)
    return folder, folder / f"2.{kind}"


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, or bits flipped, bytes replaced, taken out or doubled; at the start mostly."""
    out = bytearray(content)
    at = int(len(out) * rng.random() ** 3)
    way = rng.integers(6)
    if way == 0:
        return bytes(out[:at])
    if way == 1:
        return bytes(out[:at] + out[at + int(rng.integers(1, 20)) :])
    if way == 2:
        return bytes(out[:at] + out[at : at + int(rng.integers(1, 20))] + out[at:])
    for _ in range(int(rng.integers(1, 5))):
        at = min(int(len(out) * rng.random() ** 3), len(out) - 1)
        if way == 3:
            out[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        else:
            out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def outcomes(folder: Path, kind: str, count: int, seed: int = 0) -> Iterator[str]:
    """Load so many damaged sources; yields 'read' or the error, and raises what is neither."""
    source, file = write_source(folder, kind)
    content = file.read_bytes()
    rng = np.random.default_rng(seed)
    for _ in range(count):
        file.write_bytes(damage(content, rng))
        try:
            with memory_limit(GIGABYTES):
                dataset = load_dataset(str(source), (8, 8))
        except DataError as error:
            message = str(error)
            assert file.name in message
            assert "\n" not in message
            yield message
        else:
            for part in (dataset.train, dataset.test):
                assert part.images.dtype == np.uint8
                assert part.images.shape[1:] == (8, 8, 3)
            yield "read"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_named(tmp_path: Path, kind: str) -> None:
    found = list(outcomes(tmp_path, kind, 25))
    assert any(outcome != "read" for outcome in found)
    assert not any("closed file" in outcome for outcome in found)


def main(count: int) -> None:
    """Damage so many of each kind; prints what came, and the most memory that was taken."""
    import tempfile

    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            found = list(outcomes(Path(folder), kind, count))
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        seconds = time.perf_counter() - start
        print(f"{kind}: {found.count('read')} of {count} read, {peak} kB at most, {seconds:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]))
