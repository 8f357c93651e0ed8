"""Pictures: their formats, damaged metadata, and the memory that decoding them may take."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from tiny_run import random_images

from gcrl.config import ConfigError
from gcrl.data import DataError, load_dataset, memory_limit
from gcrl.data.budget import Budget
from gcrl.data.picture import EXTENSIONS, FORMATS, decoding, read_picture

PIXELS = random_images(1, 16, 16, 3)[0]
# The picture as it is stored -> as it is shown, by the EXIF standard's eight orientations.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


def read(file: Path, side: int = 16) -> np.ndarray:
    budget = Budget()
    with decoding(budget):
        return read_picture(file, (side, side), budget).pixels


def exif_block(orientation: int) -> bytes:
    """A TIFF structure with one tag, a short."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"II*\x00" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_exif(kind: str, exif: bytes) -> bytes:
    """The picture with these bytes as EXIF, whatever they are; put in by hand."""
    content = io.BytesIO()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}
    Image.fromarray(PIXELS).save(
        content, "JPEG" if kind == "jpg" else kind, **options.get(kind, {})
    )
    plain = content.getvalue()
    if kind == "png":
        return plain[:33] + chunk(b"eXIf", exif) + plain[33:]
    if kind == "jpg":
        return (
            plain[:2]
            + struct.pack(">2sH", b"\xff\xe1", len(exif) + 8)
            + b"Exif\0\0"
            + exif
            + plain[2:]
        )
    extended = struct.pack("<4sIB3x", b"VP8X", 10, 0x08) + bytes((15, 0, 0, 15, 0, 0))
    body = b"WEBP" + extended + plain[12:]
    body += struct.pack("<4sI", b"EXIF", len(exif)) + exif + bytes(len(exif) % 2)
    return struct.pack("<4sI", b"RIFF", len(body)) + body


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_every_orientation(tmp_path: Path, kind: str, orientation: int) -> None:
    file = tmp_path / f"x.{kind}"
    file.write_bytes(with_exif(kind, exif_block(1)))
    stored = read(file)
    file.write_bytes(with_exif(kind, exif_block(orientation)))
    assert np.array_equal(read(file), UPRIGHT[orientation](stored))
    if kind != "jpg":
        assert np.array_equal(stored, PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_a_tiff(tmp_path: Path, orientation: int) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.tif", tiffinfo={0x0112: orientation})
    assert np.array_equal(read(tmp_path / "x.tif"), UPRIGHT[orientation](PIXELS))


DAMAGED_EXIF = [
    b"",
    b"II",
    b"no exif at all",
    b"II*\x00\xff\xff\xff\xff",
    exif_block(6)[:-9],
    exif_block(99),
    b"MM" + exif_block(6)[2:],
    exif_block(6).replace(b"\x12\x01\x03\x00", b"\x12\x01\x02\x00"),
    exif_block(6).replace(b"\x12\x01\x03\x00\x01", b"\x12\x01\x03\x00\xff"),
]


@pytest.mark.parametrize("exif", DAMAGED_EXIF)
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_damaged_exif_is_passed_over(tmp_path: Path, kind: str, exif: bytes) -> None:
    file = tmp_path / f"x.{kind}"
    file.write_bytes(with_exif(kind, exif_block(1)))
    stored = read(file)
    file.write_bytes(with_exif(kind, exif))
    assert np.array_equal(read(file), stored)


@pytest.mark.parametrize("kind", [b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"acTL"])
@pytest.mark.parametrize("content", [b"", b"\0", b"x\0\0" + zlib.compress(bytes(1 << 23))])
@pytest.mark.parametrize("is_sound", [True, False])
def test_damaged_chunks_beside_the_pixels(
    tmp_path: Path, kind: bytes, content: bytes, is_sound: bool
) -> None:
    plain = with_exif("png", exif_block(1))
    odd = chunk(kind, content)
    if not is_sound:
        odd = odd[:-1] + bytes([odd[-1] ^ 1])
    (tmp_path / "x.png").write_bytes(plain[:33] + odd + plain[33:])
    assert np.array_equal(read(tmp_path / "x.png"), PIXELS)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
def test_truncated_pixels_are_an_error(tmp_path: Path, kind: str, share: float) -> None:
    file = tmp_path / f"x.{kind}"
    Image.fromarray(random_images(1, 64, 64, 3)[0]).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=rf"x\.{kind}: cannot be read as an image: "):
        read(file)


# formats


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_each_ending_is_that_of_a_format(tmp_path: Path, suffix: str) -> None:
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    Image.new(mode, (8, 8), 1 if mode != "RGB" else (1, 1, 1)).save(tmp_path / f"x{suffix}")
    assert (read(tmp_path / f"x{suffix}", 4) == (255 if mode == "1" else 1)).all()


def test_a_photograph_with_previews_is_one_picture(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (value,) * 3) for value in (90, 10)]
    frames[0].save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=frames[1:])
    budget = Budget()
    picture = read_picture(tmp_path / "x.jpg", (4, 4), budget)
    assert (picture.pixels == 90).all()
    assert not picture.was_animated


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


def test_nothing_starts_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("was started"))
    (tmp_path / "x.png").write_bytes(POSTSCRIPT)
    with pytest.raises(DataError, match=r"x\.png: .*: expected PNG, JPEG, WEBP, BMP, GIF, TIFF"):
        read(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["TGA", "ICO", "PCX", "SGI", "DDS", "PDF", "EPS"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    assert kind not in FORMATS
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png", kind)
    with pytest.raises(DataError, match=r"x\.png: cannot be read as an image: expected PNG"):
        read(tmp_path / "x.png")


def test_every_opening_names_its_formats(root: Path) -> None:
    for file in (root / "python").rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert "Image.open(" not in line or "formats=" in line, f"{file}: {line}"


# memory


def claim(kind: str, width: int, height: int) -> bytes:
    """A small file whose header says that the picture is large."""
    if kind == "png":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    if kind == "gif":
        descriptor = struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0)
        return b"GIF89a" + struct.pack("<HH3B", 8, 8, 0x80, 0, 0) + bytes(6) + descriptor + b"\2\0;"
    if kind == "bmp":
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header
    if kind == "ppm":
        return f"P6 {width} {height} 255\n".encode()
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + struct.pack("<4sIB3x", b"VP8X", 10, 0) + sizes
    return struct.pack("<4sI", b"RIFF", len(body)) + body


@pytest.mark.parametrize("side", [16_000, 12_000])
@pytest.mark.parametrize("kind", ["png", "gif", "bmp", "ppm"])
def test_a_large_picture_is_refused_by_its_header(tmp_path: Path, kind: str, side: int) -> None:
    file = tmp_path / f"x.{kind}"
    file.write_bytes(claim(kind, side, side))
    gigabytes = 2 if side == 12_000 else 1
    with (
        memory_limit(gigabytes),
        pytest.raises(DataError, match=r"x\.\w+: .*--max-gigabytes allows"),
    ):
        read(file)


def test_a_large_webp_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.webp").write_bytes(claim("webp", 16_000, 16_000))
    with memory_limit(0.1), pytest.raises(DataError, match=r"x\.webp: cannot be read as an image"):
        read(tmp_path / "x.webp")


def test_the_limit_can_be_raised(tmp_path: Path) -> None:
    for index in range(4):
        Image.new("RGB", (300, 300), (index, 9, 9)).save(tmp_path / f"{index}.png")
    needed = 300 * 300 * 20 / 1e9
    with (
        memory_limit(0.9 * needed),
        pytest.raises(
            DataError, match=r"0\.png: .*would take 0\.0018\d* GB of memory, more than the 0\.0016"
        ),
    ):
        load_dataset(str(tmp_path), (4, 4))
    with memory_limit(1.1 * needed):
        assert len(load_dataset(str(tmp_path), (4, 4)).train) == 2
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # as Pillow has it


def test_a_limit_above_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (30, 30), (5, 5, 5)).save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png") == 5).all()


def tiled_tiff(side: int) -> bytes:
    """A grey picture of 16 x 16 in one tile of side x side, of which 16 x 16 bytes are there."""
    tags = {
        256: 16,
        257: 16,
        258: 8,
        259: 1,
        262: 1,
        277: 1,
        322: side,
        323: side,
        324: 8,
        325: 256,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    pixels = PIXELS[..., 0].tobytes()
    start = struct.pack("<4sI", b"II*\0", 8 + len(pixels))
    return start + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tile_larger_than_its_picture(tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    file.write_bytes(tiled_tiff(16))
    assert np.array_equal(read(file)[..., 0], PIXELS[..., 0])
    file.write_bytes(tiled_tiff(30_000))
    with pytest.raises(DataError, match=r"would take 18 GB of memory, more than the 4 GB"):
        read(file)


@pytest.mark.parametrize("gigabytes", [0, -1.0, float("inf"), float("nan")])
def test_a_limit_is_a_positive_number(gigabytes: float) -> None:
    with pytest.raises(ConfigError, match="max_gigabytes: expected a number above 0"):
        memory_limit(gigabytes).__enter__()


def test_threads_share_one_budget() -> None:
    with memory_limit(100 / 1e9):
        budget = Budget()
    budget.keep(10)
    lock, taken, highest = threading.Lock(), 0, 0

    def work(size: int) -> None:
        nonlocal taken, highest
        for _ in range(20):
            with budget.lend(size):
                with lock:
                    taken += size
                    highest = max(highest, taken)
                time.sleep(0.0005)
                with lock:
                    taken -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in (30, 40, 50, 90, 20, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 50 <= highest <= 90
    with pytest.raises(DataError, match="would take"):
        budget.lend(91).__enter__()
    with pytest.raises(DataError, match="would take"):
        budget.keep(91)


PROGRAM = """
import sys
from gcrl import memory
from gcrl.data import load_dataset, memory_limit
memory.keep_freed()
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
load_dataset(sys.argv[1] + "/small", (4, 4))
before = peak()
with memory_limit(float(sys.argv[2])):
    load_dataset(sys.argv[1] + "/large", (4, 4))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_many_large_pictures_stay_within_the_limit(tmp_path: Path) -> None:
    """Four of 4,000 x 4,000: decoded all at once they take 800 MB."""
    for name, side in (("small", 8), ("large", 4000)):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (side, side), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "0.4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.4e9
