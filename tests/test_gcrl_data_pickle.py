"""Pickles that would keep pickle's own machine busy, or have it take memory, for a few bytes."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from test_gcrl_data_cifar10 import write_cifar10, write_pickle
from tiny_run import random_images

from gcrl.data import DataError, load_dataset, memory_limit, plain_pickle
from gcrl.data.plain_pickle import read_pickle

LARGE = struct.pack("<I", 2**31 - 2)
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"


def array(shape: bytes, content: bytes, dtype: bytes = DTYPE) -> bytes:
    """A dict with an array; `shape` and `content` are opcodes."""
    return b"}U\x01a" + ARRAY + b"(K\x01" + shape + dtype + b"\x89" + content + b"tbs."


HOSTILE = {
    # a tuple of the last tuple twice, a hundred times over: hashed, it takes 2^100 steps
    "tuples": b"}(K\x01t" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(100)) + b"K\x01s.",
    "tuples beside": b"}U\x01a)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(100)) + b"s.",
    "memo": b"}r" + LARGE + b".",
    "put": b"}p2147483646\n.",
    "string": b"}T" + LARGE + b"abc.",
    "negative string": b"}T\xff\xff\xff\xffabc.",
    "bytes": b"}B" + LARGE + b"abc.",
    "bytes8": b"}\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "bytearray8": b"}\x96" + struct.pack("<Q", 2**62) + b"abc.",
    "unicode8": b"}\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "long4": b"}\x8b" + LARGE + b"abc.",
    "digits": b"}L" + b"9" * 100_000 + b"L\n.",
    "frame": b"\x95" + struct.pack("<Q", 2**62) + b"}.",
    "deep tuples": b")" + b"\x85" * 100_000 + b".",
    "deep key": b"})" + b"\x85" * 100_000 + b"K\x01s.",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "marks": b"(" * 100_000 + b".",
    "persistent": b"}Pname\n.",
    "extension": b"}\x82\x01.",
    "object": b"}cnumpy\nndarray\n)\x81.",
    "instance": b"(inumpy\nndarray\n.",
    "call of a name": b"cnumpy\nndarray\n)R.",
    "no name": b"K\x01K\x02\x93.",
    "no mark": b"}u.",
    "a mark in a dict": b"}U\x01a(s.",
    "empty stack": b"s.",
    "get": b"h\x05.",
    "two values": b"}}.",
    "no stop": b"}",
    "append to a dict": b"}K\x01a.",
    "odd items": b"}(U\x01au.",
    "integers for keys": b"}K\x01K\x01s.",
    "huge shape": array(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"U\x01a"),
    "negative shape": array(b"J\xff\xff\xff\xffK\x01\x86", b"U\x01a"),
    "shapes product": array(b"(" + b"\x8a\x04\xff\xff\xff\x7f" * 9999 + b"t", b"U\x01a"),
    "shape of tuples": array(b")\x85", b"U\x01a"),
    "no content": array(b"K\x01\x85", b"N"),
    "other dtype": array(b"K\x01\x85", b"U\x01a", b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"),
    "a dtype of tuples": array(b"K\x01\x85", b"U\x01a", b"cnumpy\ndtype\n)\x85K\x00K\x01\x87R"),
    "no state": ARRAY + b"Nb.",
    "state of few": ARRAY + b")b.",
    "built from nothing": b"}Nb.",
}

# Values that are not looked into: what they lack is said by who wants it.
PLAIN = {"tuples beside", "memo", "put", "deep tuples", "deep lists", "frame"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "data_batch_1"
    file.write_bytes(b"\x80\x02" + HOSTILE[name])
    message = None
    tracemalloc.start()
    try:
        read_pickle(file)
    except DataError as error:
        message = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 * file.stat().st_size + 1e6
    if name in PLAIN:
        assert message is None
    else:
        assert message.startswith(f"{file}: not a file of CIFAR-10, or damaged: ")
        assert len(message) < 600
        assert "\n" not in message


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_batch_is_named(tmp_path: Path, name: str) -> None:
    folder, *_ = write_cifar10(tmp_path)
    (folder / "data_batch_2").write_bytes(b"\x80\x02" + HOSTILE[name])
    with pytest.raises(DataError, match=f"{folder / 'data_batch_2'}: not a file of CIFAR-10"):
        load_dataset(str(folder), (2, 2))


def test_a_plain_array_is_read(tmp_path: Path) -> None:
    file = tmp_path / "data_batch_1"
    file.write_bytes(b"\x80\x02" + array(b"K\x01K\x03\x86", b"U\x03abc"))
    assert read_pickle(file)[b"a"].tolist() == [[97, 98, 99]]


def test_lists_that_hold_themselves(tmp_path: Path) -> None:
    file = tmp_path / "data_batch_1"
    file.write_bytes(b"\x80\x02]q\x00h\x00a.")
    contents = read_pickle(file)
    assert contents[0] is contents


def test_values_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "STEPS", 100)
    file = tmp_path / "data_batch_1"
    for count, is_read in ((95, True), (99, False)):
        file.write_bytes(b"\x80\x02" + b"N" * count + b"(" + b"t" + b".")
        if is_read:
            with pytest.raises(DataError, match="values to unpack"):  # as many are left, not one
                read_pickle(file)
        else:
            with pytest.raises(DataError, match="expected at most 100 values"):
                read_pickle(file)


def test_a_file_larger_than_the_limit(tmp_path: Path) -> None:
    folder, *_ = write_cifar10(tmp_path)
    with (
        memory_limit(1e-6),
        pytest.raises(
            DataError, match=r"batches\.meta: would take .* GB of memory, .*--max-gigabytes allows"
        ),
    ):
        load_dataset(str(folder), (2, 2))


class OldNames(pickle._Pickler):
    """Writes arrays under the names that NumPy had before 2.0."""

    def save_global(self, obj: object, name: str | None = None) -> None:
        if getattr(obj, "__name__", "") == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


@pytest.mark.parametrize("protocol", [3, 4])
def test_newer_protocols_say_the_same(tmp_path: Path, protocol: int) -> None:
    data = random_images(3, 3072)
    values = {
        b"data": data,
        b"labels": [0, 255, 256, 70_000, -1, 2**31, -(2**40)],
        b"names": [b"a", b"x" * 300, "text", "\u00e9", None, True, False],
        "nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {b"a": {}}),
    }
    out = io.BytesIO()
    OldNames(out, protocol).dump(values)
    (tmp_path / "file").write_bytes(out.getvalue())
    contents = read_pickle(tmp_path / "file")
    assert np.array_equal(contents.pop(b"data"), values.pop(b"data"))
    assert contents == values


def test_protocol_2_says_the_same(tmp_path: Path) -> None:
    values = {b"labels": [1, -1, 2], b"data": random_images(3, 3072), b"x": b"y" * 1000}
    write_pickle(tmp_path / "file", values)
    contents = read_pickle(tmp_path / "file")
    wanted = pickle.loads((tmp_path / "file").read_bytes(), encoding="bytes")
    assert np.array_equal(contents.pop(b"data"), wanted.pop(b"data"))
    assert contents == wanted
