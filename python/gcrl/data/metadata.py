"""A picture's file without what says nothing of its pixels, in case that is what is damaged."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

PNG = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"tRNS",)  # beside the critical chunks
JPEG_DROPPED = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # all but JFIF's and Adobe's, which name colours
JPEG_SCAN = 0xDA
WEBP_DROPPED = (b"EXIF", b"XMP ", b"ICCP")
WEBP_FLAGS = 0x20 | 0x08 | 0x04  # that say that these are there


def without_metadata(content: bytes) -> bytes | None:
    """The same PNG, JPEG or WebP with its pixels alone; None for others and for damaged frames."""
    strip: Callable[[bytes], bytes]
    if content.startswith(PNG):
        strip = _strip_png
    elif content.startswith(b"\xff\xd8"):
        strip = _strip_jpeg
    elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        strip = _strip_webp
    else:
        return None
    try:
        return strip(content)
    except (IndexError, struct.error):
        return None


def _strip_png(content: bytes) -> bytes:
    parts, at = [PNG], len(PNG)
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind = content[at + 4 : at + 8]
        end = at + 12 + length
        if kind[:1].isupper() or (kind in PNG_KEPT and _is_sound(content[at:end])):
            parts.append(content[at:end])
        at = end
    return b"".join(parts)


def _is_sound(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _strip_jpeg(content: bytes) -> bytes:
    parts, at = [content[:2]], 2
    while content[at] == 0xFF and content[at + 1] != JPEG_SCAN:
        (length,) = struct.unpack_from(">H", content, at + 2)
        if content[at + 1] not in JPEG_DROPPED:
            parts.append(content[at : at + 2 + length])
        at += 2 + length
    parts.append(content[at:])
    return b"".join(parts)


def _strip_webp(content: bytes) -> bytes:
    parts, at = [b"WEBP"], 12
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, at)
        end = at + 8 + length + length % 2
        chunk = bytearray(content[at:end])
        if kind == b"VP8X":
            chunk[8] &= ~WEBP_FLAGS & 0xFF
        if kind not in WEBP_DROPPED:
            parts.append(bytes(chunk))
        at = end
    body = b"".join(parts)
    return struct.pack("<4sI", b"RIFF", len(body)) + body
