"""CIFAR-10 as it is published, whole and damaged, and its download."""

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
from tiny_run import random_images

from gcrl.data import DataError, download, fit_to_grid, load_dataset
from gcrl.data.cifar10 import FILES, FOLDER
from gcrl.data.plain_pickle import read_pickle

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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


@pytest.mark.parametrize("changed", [{"SIZE": 1000}, {"UNPACKED": 1000}])
def test_download_of_a_larger_archive(
    tmp_path: Path,
    serve: Callable[[bytes], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, int],
) -> None:
    folder, *_ = write_cifar10(tmp_path / "origin")
    serve(make_archive(folder))
    ((name, value),) = changed.items()
    monkeypatch.setattr(download, name, value)
    with pytest.raises(DataError, match="expected (at most )?1,000 bytes"):
        load_dataset(str(tmp_path / "data"), (32, 32), download=True)
    assert not os.listdir(tmp_path / "data")


def test_download_of_what_is_no_archive(
    tmp_path: Path, serve: Callable[[bytes], list[str]]
) -> None:
    serve(b"no archive")
    with pytest.raises(DataError, match="data: CIFAR-10 could not be fetched"):
        load_dataset(str(tmp_path / "data"), (32, 32), download=True)


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
