"""Images in .npz files and in folders, whole and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import random_images

from gcrl.data import DataError, fit_to_grid, load_dataset

# .npz


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
            "cannot be read: .*allow_pickle=False",
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


# folders


def write_images(folder: Path, images: np.ndarray, pattern: str = "{:03d}.png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / pattern.format(index))


def test_class_folders(tmp_path: Path) -> None:
    images = random_images(30, 8, 8, 3)
    for index, name in enumerate(("dog", "cat", "ant")):
        write_images(tmp_path / name / "deeper", images[10 * index : 10 * index + 10])
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").touch()
    dataset = load_dataset(str(tmp_path), (8, 8))
    assert dataset.class_names == ("ant", "cat", "dog")
    assert np.bincount(dataset.test.labels).tolist() == [2, 2, 2]
    assert np.bincount(dataset.train.labels).tolist() == [8, 8, 8]
    assert np.array_equal(dataset.train.images[-1], images[9]) or np.array_equal(
        dataset.test.images[-1], images[9]
    )


def test_train_and_test_folders(tmp_path: Path) -> None:
    images = random_images(8, 8, 8, 3)
    for index, name in enumerate(("a", "b", "c")):
        write_images(tmp_path / "train" / name, images[2 * index : 2 * index + 2])
    write_images(tmp_path / "test" / "c", images[6:])
    dataset = load_dataset(str(tmp_path), (8, 8))
    assert np.array_equal(dataset.train.images, images[:6])
    assert np.array_equal(dataset.test.images, images[6:])
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.tolist() == [2, 2]


def test_flat_folder_of_many_formats(tmp_path: Path) -> None:
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[:] = (200, 100, 50)
    for name in ("a.png", "b.bmp", "c.TIF", "d.ppm", "e.webp", "f.jpg", "g.gif"):
        Image.fromarray(image).save(tmp_path / name)
    Image.fromarray(image[..., 0]).save(tmp_path / "h.png")
    Image.fromarray(np.full((16, 16), 200 * 256 + 99, dtype=np.uint16)).save(tmp_path / "i.png")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "j.png")
    Image.fromarray(image).resize((40, 24)).save(tmp_path / "k.png")
    dataset = load_dataset(str(tmp_path), (8, 8))
    assert dataset.class_names is None
    assert dataset.train.labels is None
    assert len(dataset.train) + len(dataset.test) == 11
    found = np.concatenate([dataset.train.images, dataset.test.images]).astype(int)
    coloured = np.abs(found - [200, 100, 50]).max(axis=(1, 2, 3)) <= 6
    grey = np.abs(found - 200).max(axis=(1, 2, 3)) == 0
    assert (coloured.sum(), grey.sum()) == (9, 2)


def test_flat_train_and_test_folders(tmp_path: Path) -> None:
    images = random_images(5, 8, 8, 3)
    write_images(tmp_path / "train", images[:3])
    write_images(tmp_path / "test", images[3:])
    dataset = load_dataset(str(tmp_path), (8, 8))
    assert np.array_equal(dataset.train.images, images[:3])
    assert np.array_equal(dataset.test.images, images[3:])


def test_a_rotated_photo_is_read_upright(tmp_path: Path) -> None:
    images = random_images(4, 8, 8, 3)
    write_images(tmp_path, images, "{}.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 270 degrees to show
    turned = Image.fromarray(np.rot90(images[0]).copy())
    turned.save(tmp_path / "0.png", exif=exif)
    dataset = load_dataset(str(tmp_path), (8, 8))
    found = {image.tobytes() for image in (*dataset.train.images, *dataset.test.images)}
    assert found == {image.tobytes() for image in images}


def _truncate(folder: Path) -> None:
    file = folder / "a" / "001.png"
    file.write_bytes(file.read_bytes()[:-60])


def _bad_checksum(folder: Path) -> None:
    file = folder / "a" / "001.png"
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 0xFF
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "001.png: cannot be read as an image"),
        (_bad_checksum, "001.png: cannot be read as an image"),
        (lambda folder: (folder / "a" / "x.jpg").touch(), "x.jpg: cannot be read as an image"),
        (
            lambda folder: Image.fromarray(np.ones((8, 8), np.float32)).save(
                folder / "a" / "x.tif"
            ),
            "x.tif: cannot be read as an image: expected 8 or 16 bits",
        ),
        (lambda folder: write_images(folder, IMAGES[:1]), "got both"),
        (lambda folder: (folder / "train").mkdir(), "has train/ but no test/"),
        (lambda folder: write_images(folder / "test", IMAGES), "has test/ but no train/"),
    ],
)
def test_a_wrong_folder_is_named(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, random_images(4, 16, 16, 3))
    damage(tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}.*{message}"):
        load_dataset(str(tmp_path), (8, 8))


def test_folders_with_too_little(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no images \(\.avif"):
        load_dataset(str(tmp_path), (8, 8))
    write_images(tmp_path, IMAGES[:1])
    with pytest.raises(DataError, match=r"expected at least 4 images, .* got 1"):
        load_dataset(str(tmp_path), (8, 8))


def test_train_and_test_that_do_not_match(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", IMAGES)
    write_images(tmp_path / "test" / "b", IMAGES)
    with pytest.raises(DataError, match="test/b: a class that train/ does not have"):
        load_dataset(str(tmp_path), (8, 8))
    (tmp_path / "test" / "b").rename(tmp_path / "aside")
    write_images(tmp_path / "test", IMAGES)
    with pytest.raises(DataError, match="in both train/ and test/, or in neither"):
        load_dataset(str(tmp_path), (8, 8))
