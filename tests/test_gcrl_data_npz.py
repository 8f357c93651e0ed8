"""Images in .npz files, whole and damaged."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_run import random_images

from gcrl.data import DataError, fit_to_grid, load_dataset, memory_limit


def test_npz_with_a_test_part(tmp_path: Path) -> None:
    images, test_images = random_images(6, 8, 8, 3), random_images(3, 16, 16, 3, seed=1)
    np.savez(
        tmp_path / "set.npz",
        images=images,
        labels=np.arange(6, dtype=np.uint8),
        test_images=test_images,
        test_labels=[2, 1, 0],
    )
    dataset = load_dataset(str(tmp_path / "set.npz"), (8, 8))
    assert (dataset.name, dataset.class_names) == ("set", None)
    assert np.array_equal(dataset.train.images, images)
    assert np.array_equal(dataset.test.images, fit_to_grid(test_images, (8, 8)))
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.test.labels.tolist() == [2, 1, 0]
    assert dataset.train.labels.dtype == dataset.test.labels.dtype == np.int64


def test_npz_is_split_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    labels = np.repeat(np.arange(10), 10)
    images = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    np.savez(path, images=images, labels=labels)
    first, again, other = (load_dataset(str(path), (1, 1), seed=seed) for seed in (0, 0, 1))
    drawn = [part.test.images[:, 0, 0, 0].tolist() for part in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert np.bincount(first.test.labels).tolist() == [2] * 10
    assert np.array_equal(first.test.labels, labels[drawn[0]])
    whole = drawn[0] + first.train.images[:, 0, 0, 0].tolist()
    assert sorted(whole) == list(range(100))


def test_npz_grey_and_without_labels(tmp_path: Path) -> None:
    images = random_images(10, 8, 8)
    np.savez_compressed(tmp_path / "grey.npz", images=images)
    dataset = load_dataset(str(tmp_path / "grey.npz"), (8, 8))
    assert dataset.train.labels is None
    assert dataset.test.labels is None
    assert (len(dataset.train), len(dataset.test)) == (8, 2)
    assert (dataset.train.images == dataset.train.images[..., :1]).all()
    assert dataset.train.images[0, ..., 0].tobytes() in {image.tobytes() for image in images}


IMAGES = random_images(8, 8, 8, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, r"expected an array 'images', got \['pictures'\]"),
        (
            {"images": IMAGES.astype(np.float32)},
            r"'images': expected uint8 .*, got float32 \[8, 8, 8",
        ),
        (
            {"images": IMAGES.transpose(0, 3, 1, 2)},
            r"'images': expected uint8 .*, got uint8 \[8, 3, 8",
        ),
        ({"images": IMAGES[:, :0]}, r"'images': expected uint8"),
        ({"images": IMAGES[0, 0]}, r"'images': expected uint8 .*, got uint8 \[8, 3\]"),
        (
            {"images": IMAGES, "labels": np.arange(7)},
            r"'labels': expected one per image, \[8\], got",
        ),
        ({"images": IMAGES, "labels": np.arange(8.0)}, "'labels': expected integers, got float64"),
        ({"images": IMAGES, "labels": ["cat"] * 8}, "'labels': expected integers, got <U3"),
        ({"images": IMAGES, "labels": np.arange(8) - 1}, "'labels': expected none below 0, got -1"),
        (
            {"images": IMAGES, "labels": np.array([{}] * 8)},
            "'labels': expected numbers, got Python objects",
        ),
        ({"images": IMAGES, "test_labels": np.arange(8)}, "'test_labels' but no 'test_images'"),
        ({"images": IMAGES, "labels": np.arange(8), "test_images": IMAGES}, "both, or neither"),
        ({"images": IMAGES, "test_images": IMAGES[:1]}, "at least 2 images to test with, got 1"),
        ({"images": IMAGES[:1], "test_images": IMAGES}, "at least 2 images to train on, got 1"),
        ({"images": IMAGES[:1]}, "at least 4 images, .* got 1"),
        ({"images": IMAGES[:0]}, "at least 4 images, .* got 0"),
    ],
)
def test_a_wrong_npz_is_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=f"wrong.npz: .*{message}"):
        load_dataset(str(path), (8, 8))


def test_a_damaged_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, images=IMAGES)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], b"", b"no archive", bytes(middle)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged.npz: (not an .npz file|cannot be read)"):
            load_dataset(str(path), (8, 8))


@pytest.mark.parametrize("is_compressed", [True, False])
@pytest.mark.parametrize("is_grey", [True, False])
def test_npz_in_several_pieces(tmp_path: Path, is_compressed: bool, is_grey: bool) -> None:
    """More than is unpacked at a time, in C's order and in Fortran's."""
    images = random_images(40, 300, 260) if is_grey else random_images(40, 300, 260, 3)
    labels = np.arange(40).astype(">u2")
    save = np.savez_compressed if is_compressed else np.savez
    save(
        tmp_path / "set.npz",
        images=images, labels=labels,
        test_images=np.asfortranarray(images[:9]), test_labels=labels[:9],
    )  # fmt: skip
    dataset = load_dataset(str(tmp_path / "set.npz"), (6, 5))
    rgb = np.repeat(images[..., np.newaxis], 3, axis=3) if is_grey else images
    assert np.array_equal(dataset.train.images, fit_to_grid(rgb, (6, 5)))
    assert np.array_equal(dataset.test.images, fit_to_grid(rgb[:9], (6, 5)))
    assert dataset.train.labels.tolist() == list(range(40))
    assert dataset.train.labels.dtype == np.int64


def test_npz_takes_the_memory_of_the_grid(tmp_path: Path) -> None:
    """60 MB of pixels, of which 240 kB are left."""
    np.savez_compressed(tmp_path / "set.npz", images=np.zeros((20_000, 32, 32, 3), np.uint8))
    with memory_limit(0.1):
        load_dataset(str(tmp_path / "set.npz"), (2, 2))
        tracemalloc.start()
        load_dataset(str(tmp_path / "set.npz"), (2, 2))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize(
    ("shape", "dtype", "grid", "needed"),
    [
        ((4, 500, 500, 3), "u1", (2, 2), 4 * 500 * 500 * 20),  # pixels that are resized
        ((50_000, 1, 1), "u1", (8, 8), 2 * 50_000 * 8 * 8 * 3),  # images on the grid
    ],
)
def test_a_large_npz_is_refused(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, grid: tuple[int, int], needed: int
) -> None:
    path = tmp_path / "large.npz"
    np.savez_compressed(path, images=np.zeros(shape, dtype))
    with (
        memory_limit(0.9 * needed / 1e9),
        pytest.raises(
            DataError, match=r"large\.npz: 'images': would take .* that --max-gigabytes allows"
        ),
    ):
        load_dataset(str(path), grid)
    with memory_limit(2 * needed / 1e9):
        load_dataset(str(path), grid)


def npy(shape: object, *, dtype: str = "|u1", version: int = 1, length: int | None = None) -> bytes:
    """A header as NumPy writes it, with any shape; no values."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes((version, 0)) + size + header


BLOCK = bytes(8 * 8 * 8 * 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy((8, 8, 8, 3)), r"not as many as uint8 \[8, 8, 8, 3\] needs"),
        (npy((10**9, 32, 32, 3)), r"not as many as uint8 \[1000000000, 32, 32, 3\]"),
        (npy((8, 8, 8, 3)) + BLOCK + b"x", "not as many as"),
        (npy((7, 8, 8, 3)) + BLOCK, "not as many as"),
        (npy((-8, 8, -8, 3)) + BLOCK, "not as many as"),
        (npy((10**400, 8, 8, 3)) + BLOCK, "not as many as"),
        (npy("()") + b"x", r"'images': expected uint8 .*, got uint8 \[\]"),
        (npy("(8,"), "expected an array as NumPy writes it"),
        (npy("8" * 9000), "expected an array as NumPy writes it"),
        (npy("-" * 9000 + "8"), "expected an array as NumPy writes it"),
        (npy((8, 8, 8, 3), dtype="|O") + BLOCK, "got Python objects"),
        (npy((8, 8, 8, 3), dtype="|V0"), "expected uint8"),
        (npy((8, 8, 8, 3), version=2) + BLOCK, None),
        (npy((8, 8, 8, 3), version=2, length=2**32 - 1) + BLOCK, "expected an array as NumPy"),
        (npy((8, 8, 8, 3), version=3) + BLOCK, r"version \(3, 0\) of the format"),
        (b"", "expected an array as NumPy writes it"),
        (b"a text", "expected an array as NumPy writes it"),
    ],
)
def test_headers_of_arrays(tmp_path: Path, content: bytes, message: str | None) -> None:
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("images.npy", content)
    if message is None:
        assert len(load_dataset(str(tmp_path / "odd.npz"), (2, 2)).train) == 6
    else:
        tracemalloc.start()
        with pytest.raises(DataError, match=f"odd.npz: .*{message}"):
            load_dataset(str(tmp_path / "odd.npz"), (2, 2))
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", "no array")
    with pytest.raises(DataError, match=r"odd\.npz: 'images': expected an array, images\.npy, got"):
        load_dataset(str(path), (2, 2))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no array")
    with pytest.raises(DataError, match=r"odd\.npz: expected an array 'images', got \['notes.txt'"):
        load_dataset(str(path), (2, 2))
    content = io.BytesIO()
    np.save(content, IMAGES)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", content.getvalue())
        archive.writestr("notes.txt", "which is left alone")
    assert len(load_dataset(str(path), (2, 2)).train) == 6


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path: Path, method: int) -> None:
    """zipfile unpacks it in pieces of any size."""
    with zipfile.ZipFile(tmp_path / "odd.npz", "w", method) as archive:
        archive.writestr("images.npy", npy((10**6, 8, 8, 3)) + bytes(10**6))
    with pytest.raises(DataError, match="'images': compressed in another way than NumPy does"):
        load_dataset(str(tmp_path / "odd.npz"), (2, 2))


def test_an_encrypted_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, images=IMAGES)
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # their flags
        content[content.index(signature) + at] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.npz: cannot be read: .* is encrypted"):
        load_dataset(str(path), (2, 2))
