"""Every source of images, whole and damaged."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances_argmin

from gcrl.data import DataError, ImageSet, download, fit_to_grid, load_dataset
from gcrl.data.cifar10 import FILES, FOLDER, read_pickle
from gcrl.data.dataset import hold_out

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


# fit_to_grid


def test_blocks_are_averaged_exactly() -> None:
    images = random_images(5, 12, 24, 3)
    fitted = fit_to_grid(images, (4, 8))
    means = images.astype(float).reshape(5, 4, 3, 8, 3, 3).mean(axis=(2, 4))
    assert fitted.dtype == np.uint8
    assert np.array_equal(fitted, np.floor(means + 0.5))


def test_white_stays_white_in_large_blocks() -> None:
    images = np.full((1, 2048, 2048, 3), 255, dtype=np.uint8)
    assert (fit_to_grid(images, (2, 2)) == 255).all()


def test_the_middle_is_kept_where_the_aspect_differs() -> None:
    images = np.zeros((2, 16, 48, 3), dtype=np.uint8)
    images[:, :, 16:32] = random_images(2, 16, 16, 3)
    assert np.array_equal(fit_to_grid(images, (8, 8)), fit_to_grid(images[:, :, 16:32], (8, 8)))
    assert np.array_equal(fit_to_grid(images, (16, 16)), images[:, :, 16:32])


@pytest.mark.parametrize("size", [(7, 7), (30, 20), (100, 37), (64, 65)])
def test_other_sizes_are_resampled(size: tuple[int, int]) -> None:
    row, column = np.mgrid[: size[0], : size[1]] + 0.5
    waves = np.stack([row / size[0], column / size[1], 0 * row], axis=-1) * 200
    fitted = fit_to_grid(waves.astype(np.uint8)[np.newaxis], (16, 16))[0].astype(float)
    assert fitted.shape == (16, 16, 3)
    middle = fitted[4:12, 4:12].mean(axis=(0, 1))
    assert middle == pytest.approx([100, 100, 0], abs=2)


def test_fine_stripes_are_smoothed_not_sampled() -> None:
    stripes = np.zeros((1, 50, 50, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(fit_to_grid(stripes, (16, 16)).astype(int) - 100).max() < 25


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)],
)
def test_fit_to_grid_refuses_other_arrays(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images: expected uint8"):
        fit_to_grid(images, (4, 4))


# digits


def test_digits_are_the_same_on_every_call() -> None:
    first, second = load_dataset("digits", (16, 16)), load_dataset("digits", (16, 16), seed=7)
    assert (len(first.train), len(first.test)) == (4 * 1438, 4 * 359)
    assert first.train.images.shape[1:] == (16, 16, 3)
    assert first.class_names == tuple("0123456789")
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.test.labels, second.test.labels)
    assert np.bincount(first.test.labels).min() >= 4 * 34  # every class alike


def test_each_digit_is_four_times_in_one_part() -> None:
    real = load_digits()
    dataset = load_dataset("digits", (16, 16))
    shapes = upper_left(real.images)
    painted = [upper_left(part.images.max(axis=3)) for part in (dataset.train, dataset.test)]
    train, test = (pairwise_distances_argmin(part, shapes) for part in painted)  # whose
    assert np.array_equal(np.bincount(np.concatenate((train, test))), np.full(1797, 4))
    assert not set(train) & set(test)
    assert np.array_equal(real.target[train], dataset.train.labels)
    assert np.array_equal(real.target[test], dataset.test.labels)
    everything = ImageSet(real.images, real.target)
    held_out = {digit.tobytes() for digit in hold_out(everything, 0)[1].images}
    assert {digit.tobytes() for digit in real.images[test]} == held_out


def upper_left(pictures: np.ndarray) -> np.ndarray:
    """[N, side, side], each dark around at most 8x8 -> [N, 64]: those at the corner, 1 at most."""
    corners = np.zeros((len(pictures), 8, 8))
    bright = pictures / pictures.max(axis=(1, 2))[:, None, None]
    for corner, picture in zip(corners, bright, strict=True):
        rows, columns = np.nonzero(picture)
        part = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        corner[: part.shape[0], : part.shape[1]] = part
    return corners.reshape(len(pictures), 64)


def test_digits_have_their_own_colours_and_places() -> None:
    images = load_dataset("digits", (16, 16)).train.images
    assert images.max(axis=(1, 2)).min() > 100  # bright in every channel
    assert images.max(axis=(1, 2)).std(axis=0).min() > 30
    lit = images.any(axis=3)  # [N, 16, 16]
    rows, columns = lit.any(axis=2).argmax(axis=1), lit.any(axis=1).argmax(axis=1)
    assert set(range(9)) <= set(rows)
    assert set(range(9)) <= set(columns)
    for copies in images.reshape(4, -1, 16, 16, 3).swapaxes(0, 1):
        assert len({copy.tobytes() for copy in copies}) == 4


def test_digits_lie_on_plain_black() -> None:
    images = load_dataset("digits", (16, 16)).train.images
    black = (images == 0).all(axis=3).sum(axis=(1, 2))
    assert black.min() >= 16 * 16 - 8 * 8


def test_strokes_are_shades_of_one_colour() -> None:
    images = load_dataset("digits", (16, 16)).train.images.astype(float)
    pixels = images.reshape(len(images), -1, 3)  # [N, 256, 3]
    brightest = np.linalg.norm(pixels, axis=2).argmax(axis=1)
    colour = pixels[np.arange(len(images)), brightest]
    direction = colour / np.linalg.norm(colour, axis=1, keepdims=True)
    along = np.einsum("npc,nc->np", pixels, direction)
    assert np.abs(pixels - along[..., None] * direction[:, None]).max() < 1.5


def test_pixels_of_the_digits_say_little() -> None:
    from sklearn.linear_model import RidgeClassifier

    digits = load_dataset("digits", (16, 16))
    train, test = (part.images.reshape(len(part), -1) / 255 for part in (digits.train, digits.test))
    probe = RidgeClassifier(alpha=100).fit(train, digits.train.labels)
    assert probe.score(test, digits.test.labels) < 0.25


# CIFAR-10


def official(value: object) -> bytes:
    """The pickle opcodes of a value as Python 2 wrote them for the official files."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(official, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(official(k) + official(v) for k, v in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + official(0)
    shape = b"(" + b"".join(map(official, value.shape)) + b"t"
    code = value.dtype.str[1:].encode()
    dtype = b"cnumpy\ndtype\n" + official(code) + official(0) + official(1) + b"\x87R"
    dtype += b"(" + official(3) + official(b"|") + b"NNN" + official(-1) * 2 + official(0) + b"tb"
    state = b"(" + official(1) + shape + dtype + b"\x89" + official(value.tobytes()) + b"tb"
    return start + b"\x85" + official(b"b") + b"\x87R" + state


def write_pickle(path: Path, value: object) -> None:
    path.write_bytes(b"\x80\x02" + official(value) + b".")


def write_cifar10(parent: Path, per_batch: int = 4) -> tuple[Path, np.ndarray, np.ndarray]:
    """A small CIFAR-10. Returns its folder, all images [6 * per_batch, 32, 32, 3] and labels."""
    folder = parent / FOLDER
    folder.mkdir(parents=True)
    images = random_images(6 * per_batch, 32, 32, 3)
    labels = np.arange(6 * per_batch) * 3 % 10
    for index, name in enumerate(FILES[:6]):
        part = slice(index * per_batch, (index + 1) * per_batch)
        data = images[part].transpose(0, 3, 1, 2).reshape(per_batch, 3072)
        write_pickle(
            folder / name,
            {b"batch_label": name.encode(), b"labels": labels[part].tolist(), b"data": data},
        )
    write_pickle(folder / "batches.meta", {b"label_names": [name.encode() for name in NAMES]})
    return folder, images, labels


@pytest.mark.parametrize("below", [".", FOLDER])
def test_cifar10_is_read(tmp_path: Path, below: str) -> None:
    _, images, labels = write_cifar10(tmp_path)
    dataset = load_dataset(str(tmp_path / below), (32, 32))
    assert dataset.name == "cifar10"
    assert dataset.class_names == NAMES
    assert np.array_equal(dataset.train.images, images[:20])
    assert np.array_equal(dataset.test.images, images[20:])
    assert np.array_equal(dataset.train.labels, labels[:20])
    assert np.array_equal(dataset.test.labels, labels[20:])
    assert dataset.train.labels.dtype == np.int64
    small = load_dataset(str(tmp_path), (16, 16))
    assert np.array_equal(small.train.images, fit_to_grid(images[:20], (16, 16)))


def test_real_cifar10(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The real images, in files as their authors wrote them, come back bit by bit."""
    if not (REAL / "cifar10_test.npz").exists():
        pytest.skip("needs ../shared/data/cifar10_test.npz")
    with np.load(REAL / "cifar10_test.npz") as packed:
        planes = packed["residual"].cumsum(axis=-2, dtype=np.uint8)
        planes = planes.cumsum(axis=-1, dtype=np.uint8)  # R-G, G, B-G: [3, N, 32, 32]
        labels = packed["labels"].tolist()
    planes[0] += planes[1]
    planes[2] += planes[1]
    folder, *_ = write_cifar10(tmp_path_factory.mktemp("real"))
    data = planes.transpose(1, 0, 2, 3).reshape(10_000, 3072)
    write_pickle(folder / "test_batch", {b"labels": labels, b"data": data})
    dataset = load_dataset(str(folder), (32, 32))
    assert np.array_equal(dataset.test.images, planes.transpose(1, 2, 3, 0))
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_in_a_pickle_is_run(tmp_path: Path, protocol: int) -> None:
    folder, *_ = write_cifar10(tmp_path)
    marker = tmp_path / "was-run"
    contents = {0: _Malicious(marker)}
    (folder / "data_batch_2").write_bytes(pickle.dumps(contents, protocol))
    with pytest.raises(DataError, match=r"data_batch_2: .*system, which CIFAR-10 does not need"):
        load_dataset(str(tmp_path), (32, 32))
    assert not marker.exists()
    pickle.loads((folder / "data_batch_2").read_bytes())
    assert marker.exists()  # the plain unpickler does run it


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "numpy load", "numpy.core.multiarray frombuffer"]
)
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    with pytest.raises(DataError, match=f"asks for {name.replace(' ', '.')}"):
        read_pickle(file)


def _without(key: bytes) -> Callable[[dict], None]:
    return lambda batch: batch.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(b"labels"), "has no 'labels'"),
        (_without(b"data"), "has no 'data'"),
        (lambda batch: batch[b"labels"].pop(), "'labels': expected a list of 4, got 3"),
        (lambda batch: batch[b"labels"].__setitem__(0, 10), "expected integers from 0 to 9"),
        (lambda batch: batch[b"labels"].__setitem__(0, b"cat"), "expected integers from 0 to 9"),
        (
            lambda batch: batch.update({b"data": batch[b"data"][:, :1024]}),
            r"\[N, 3072\], got \[4, 1",
        ),
        (lambda batch: batch.update({b"data": batch[b"data"].astype("f4")}), "unsigned bytes"),
        (lambda batch: batch.update({b"data": b"none"}), r"\[N, 3072\], got bytes"),
    ],
)
def test_a_wrong_batch_is_named(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    folder, images, _ = write_cifar10(tmp_path)
    data = images[:4].transpose(0, 3, 1, 2).reshape(4, 3072)
    batch = {b"labels": [0, 1, 2, 3], b"data": data}
    change(batch)
    write_pickle(folder / "data_batch_4", batch)
    with pytest.raises(DataError, match=f"data_batch_4: .*{message}"):
        load_dataset(str(tmp_path), (32, 32))


def test_a_damaged_batch_is_named(tmp_path: Path) -> None:
    folder, *_ = write_cifar10(tmp_path)
    whole = (folder / "test_batch").read_bytes()
    for damaged in (whole[:-1000], b"", b"\x00" * 100):
        (folder / "test_batch").write_bytes(damaged)
        with pytest.raises(DataError, match="test_batch: not a file of CIFAR-10, or damaged"):
            load_dataset(str(tmp_path), (32, 32))
    (folder / "test_batch").unlink()
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="not complete: data_batch_3, test_batch missing"):
        load_dataset(str(tmp_path), (32, 32))


# download


def make_archive(folder: Path, extra: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, arcname=FOLDER)
        for name, content in (extra or {}).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[bytes], list[str]]]:
    """Serve an archive on this machine in place of the authors' site; returns the requests."""
    root = tmp_path / "site"
    root.mkdir()
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            requests.append(format % args)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(root))
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "URL", f"http://127.0.0.1:{server.server_port}/archive.tar.gz")

    def publish(archive: bytes) -> list[str]:
        (root / "archive.tar.gz").write_bytes(archive)
        monkeypatch.setattr(download, "MD5", hashlib.md5(archive).hexdigest())
        return requests

    yield publish
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("source", ["data", f"data/{FOLDER}"])
def test_download(tmp_path: Path, serve: Callable[[bytes], list[str]], source: str) -> None:
    folder, images, _ = write_cifar10(tmp_path / "origin")
    unwanted = {f"{FOLDER}/readme.html": b"", "../outside": b"", f"{FOLDER}/../../outside": b""}
    requests = serve(make_archive(folder, unwanted))
    target = tmp_path / source
    dataset = load_dataset(str(target), (32, 32), download=True)
    assert np.array_equal(dataset.train.images, images[:20])
    assert sorted(os.listdir(tmp_path / "data" / FOLDER)) == sorted(FILES)
    assert os.listdir(tmp_path / "data") == [FOLDER]
    assert not list(tmp_path.glob("**/outside"))
    load_dataset(str(target), (32, 32), download=True)
    assert len(requests) == 1  # complete: not fetched again
    (tmp_path / "data" / FOLDER / "test_batch").unlink()
    load_dataset(str(target), (32, 32), download=True)
    assert len(requests) == 2


def test_download_of_another_archive(
    tmp_path: Path, serve: Callable[[bytes], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = write_cifar10(tmp_path / "origin")
    serve(make_archive(folder))
    monkeypatch.setattr(download, "MD5", "0" * 32)
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("unpacked before verified"))
    with pytest.raises(DataError, match=r"archive.tar.gz: expected MD5 0000.*nothing was unpacked"):
        load_dataset(str(tmp_path / "data"), (32, 32), download=True)
    assert not os.listdir(tmp_path / "data")


def test_download_of_an_incomplete_archive(
    tmp_path: Path, serve: Callable[[bytes], list[str]]
) -> None:
    folder, *_ = write_cifar10(tmp_path / "origin")
    (folder / "data_batch_5").unlink()
    (folder / "data_batch_5").symlink_to("/etc/passwd")
    serve(make_archive(folder))
    with pytest.raises(DataError, match=f"archive has no file {FOLDER}/data_batch_5"):
        load_dataset(str(tmp_path / "data"), (32, 32), download=True)
    assert not os.listdir(tmp_path / "data")


def test_download_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "URL", "http://127.0.0.1:1/archive.tar.gz")
    with pytest.raises(
        DataError, match=r"data: CIFAR-10 could not be fetched from http://127.*refus"
    ):
        load_dataset(str(tmp_path / "data"), (32, 32), download=True)
    assert not os.listdir(tmp_path / "data")


def test_download_is_of_cifar10_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="digits need no download"):
        load_dataset("digits", (16, 16), download=True)
    (tmp_path / "images.npz").touch()
    with pytest.raises(DataError, match="download expects a folder"):
        load_dataset(str(tmp_path / "images.npz"), (16, 16), download=True)


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


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such file or folder. Expected 'digits'"):
        load_dataset(str(tmp_path / "absent"), (8, 8))
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"a.csv: expected an .npz file or a folder"):
        load_dataset(str(tmp_path / "a.csv"), (8, 8))
