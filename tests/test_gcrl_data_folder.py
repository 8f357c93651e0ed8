"""Images in folders, whole and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import random_images

from gcrl.data import DataError, load_dataset

IMAGES = random_images(8, 8, 8, 3)


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
    with pytest.raises(DataError, match=r"has no images \(\.bmp"):
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


# what is found, and what is said of the rest


def write_uniform(path: Path, value: int) -> None:
    """A picture of one grey value, by which it is recognised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path, "PNG")


def values(folder: Path, name: str | None = None) -> list[int]:
    """The grey values of all pictures that are read; of one class, where it is named."""
    dataset = load_dataset(str(folder), (2, 2))
    images = np.concatenate((dataset.train.images, dataset.test.images))
    grey = images[:, 0, 0, 0]
    if name is not None:
        labels = np.concatenate((dataset.train.labels, dataset.test.labels))
        grey = grey[labels == dataset.class_names.index(name)]
    return sorted(grey.tolist())


def two_classes(folder: Path) -> None:
    for index in range(3):
        write_uniform(folder / "cat" / f"{index}.png", 10 + index)
        write_uniform(folder / "dog" / f"{index}.png", 20 + index)


def test_links_are_followed_and_loops_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photos, aside = tmp_path / "photos", tmp_path / "aside"
    two_classes(photos)
    for index in range(2):
        write_uniform(aside / "more" / "deep" / f"{index}.png", 30 + index)
        write_uniform(aside / "hens" / f"{index}.png", 40 + index)
    write_uniform(aside / "one", 50)
    (photos / "cat" / "more").symlink_to(aside / "more")
    (photos / "dog" / "one.png").symlink_to(aside / "one")  # its name here says what it is
    (photos / "hen").symlink_to("../aside/hens")
    (photos / "cat" / "up").symlink_to("..")
    (photos / "cat" / "here").symlink_to(".")
    (aside / "more" / "photos").symlink_to(photos)
    (aside / "more" / "deep" / "back").symlink_to("..")
    (photos / "all").symlink_to(".")
    (photos / "turns.png").symlink_to("turns.png")
    assert values(photos, "cat") == [10, 11, 12, 30, 31]
    assert values(photos, "dog") == [20, 21, 22, 50]
    assert values(photos, "hen") == [40, 41]
    assert load_dataset(str(photos), (2, 2)).class_names == ("cat", "dog", "hen")
    assert (
        f"gcrl: {photos}: 1 name of no file left out: {photos}/turns.png\n"
        in capfd.readouterr().err
    )


def test_many_links_between_folders_end(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "cat" / "maze").mkdir()
    rooms = [tmp_path / "cat" / "maze" / f"{room:02d}" for room in range(14)]
    for room in rooms:
        room.mkdir()
        for other in rooms:
            (room / other.name).symlink_to(other)
    write_uniform(rooms[5] / "x.png", 60)
    assert values(tmp_path, "cat") == [10, 11, 12, 60]


def test_a_picture_counts_once_where_it_lies(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    two_classes(tmp_path)
    (tmp_path / "cat" / "a.png").symlink_to("../dog/0.png")
    (tmp_path / "cat" / "b.png").symlink_to("2.png")
    (tmp_path / "ant").symlink_to("dog")
    (tmp_path / "elk").mkdir()
    (tmp_path / "fox").mkdir()
    write_uniform(tmp_path.parent / f"{tmp_path.name}-aside.png", 70)
    for name in ("elk", "fox"):
        (tmp_path / name / "x.png").symlink_to(tmp_path.parent / f"{tmp_path.name}-aside.png")
    assert values(tmp_path, "cat") == [10, 11, 12]
    assert values(tmp_path, "dog") == [20, 21, 22]
    assert values(tmp_path, "elk") == [70]
    assert load_dataset(str(tmp_path), (2, 2)).class_names == ("cat", "dog", "elk")
    said = capfd.readouterr().err
    assert "6 names of pictures that others lead to as well left out" in said  # a, b, ant's, fox's
    assert "2 folders without images left out: ant, fox" in said


def test_links_in_a_flat_folder(tmp_path: Path) -> None:
    for index in range(5):
        write_uniform(tmp_path / "aside" / f"{index}", index)
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{index}.png").symlink_to(f"../aside/{index}")
    (tmp_path / "flat" / "again.png").symlink_to("0.png")
    assert values(tmp_path / "flat") == [0, 1, 2, 3, 4]
    (tmp_path / "link").symlink_to("flat")
    assert load_dataset(str(tmp_path / "link"), (2, 2)).name == "link"


def test_nothing_hidden_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    two_classes(tmp_path)
    for hidden in (".ipynb_checkpoints/x.png", "deep/.cache/x.png", "._0.png", ".thumbs/a/x.png"):
        write_uniform(tmp_path / "cat" / hidden, 99)
        write_uniform(tmp_path / hidden, 99)
    (tmp_path / "cat" / ".DS_Store").touch()
    assert values(tmp_path) == [10, 11, 12, 20, 21, 22]
    assert ".DS_Store" not in capfd.readouterr().err


def test_what_is_left_out_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    two_classes(tmp_path)
    for name in ("cat/notes.txt", "cat/a.avif", "dog/b.AVIF", "README"):
        (tmp_path / name).touch()
    for name in ("elk", "fox/deep"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "cat" / "clear.png")
    Image.new("LA", (8, 8), (1, 254)).save(tmp_path / "cat" / "nearly.png")
    keyed = Image.new("P", (8, 8), 1)
    keyed.putpalette([0, 0, 0, 9, 9, 9])
    keyed.save(tmp_path / "cat" / "keyed.png", transparency=1)
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "cat" / "opaque.png")
    dataset = load_dataset(str(tmp_path), (2, 2))
    assert len(dataset.train) + len(dataset.test) == 10
    said = capfd.readouterr().err.splitlines()
    assert said == [
        f"gcrl: {tmp_path}: 4 files left out, by their names: .avif, no ending, .txt",
        f"gcrl: {tmp_path}: 1 name of no file left out: {tmp_path}/dog/gone.png",
        f"gcrl: {tmp_path}: 2 folders without images left out: elk, fox",
        f"gcrl: {tmp_path}: the transparency of 3 pictures is dropped",
    ]


def test_one_process_of_several_says_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_classes(tmp_path)
    (tmp_path / "notes.txt").touch()
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        load_dataset(str(tmp_path), (2, 2))
        assert len(capfd.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_pictures_is_taken(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for index in range(5):
        frames = [Image.new("RGB", (8, 8), (v,) * 3) for v in (40 * index, 250, 120)]
        options = {"lossless": True} if kind == "webp" else {}
        more = frames[1:] if index < 3 else []
        frames[0].save(tmp_path / f"{index}.{kind}", save_all=True, append_images=more, **options)
    assert values(tmp_path) == [0, 40, 80, 120, 160]
    said = capfd.readouterr().err
    assert said == f"gcrl: {tmp_path}: of 3 files with several pictures the first is taken\n"


# train and test


@pytest.mark.parametrize("name", ["train", "test", "Train"])
def test_a_class_of_that_name(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    two_classes(tmp_path)
    for index in range(3):
        write_uniform(tmp_path / name / f"{index}.png", 30 + index)
    assert values(tmp_path, name) == [30, 31, 32]
    assert values(tmp_path, "cat") == [10, 11, 12]
    assert f"{name}/ is read as a class, like cat/ beside it" in capfd.readouterr().err


@pytest.mark.parametrize("others", [(), ("val",), ("validation", "dev")])
@pytest.mark.parametrize(("name", "absent"), [("train", "test"), ("test", "train")])
def test_half_a_split(tmp_path: Path, name: str, absent: str, others: tuple[str, ...]) -> None:
    for part in (name, *others):
        two_classes(tmp_path / part)
    with pytest.raises(DataError, match=f"{tmp_path}: has {name}/ but no {absent}/ beside it"):
        load_dataset(str(tmp_path), (2, 2))


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "TEST")])
def test_a_split_beside_other_folders(
    tmp_path: Path, names: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    for index, part in enumerate((*names, "val")):
        for offset in range(2):
            write_uniform(tmp_path / part / "a" / f"{offset}.png", 10 * index + offset)
    dataset = load_dataset(str(tmp_path), (2, 2))
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [10, 11]
    said = capfd.readouterr().err
    assert said == f"gcrl: {tmp_path}: val/ is left out, as train/ and test/ are a split\n"
