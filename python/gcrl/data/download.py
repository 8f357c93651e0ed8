"""CIFAR-10 from its authors' site."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from tqdm import tqdm

from gcrl.data import cifar10
from gcrl.data.dataset import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SIZE = 170_498_071  # bytes of the archive
UNPACKED = 1 << 26  # bytes of a file in it, at most
MD5 = "c58f30108f718f92721af3b95e74349a"  # as published beside the archive
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 18  # bytes


def fetch_cifar10(parent: Path) -> Path:
    """Fetch the archive, compare its checksum, and only then unpack its seven files below `parent`.

    Returns parent/cifar-10-batches-py. What is there already is kept until everything has arrived.
    Raises DataError if the archive cannot be fetched, or is another one.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=parent) as temporary:
            archive = Path(temporary) / "archive.tar.gz"
            _fetch(archive)
            _unpack(archive, Path(temporary))
            folder = parent / cifar10.FOLDER
            folder.mkdir(exist_ok=True)
            for name in cifar10.FILES:
                os.replace(Path(temporary) / name, folder / name)
    except (OSError, EOFError, ValueError, http.client.HTTPException, tarfile.TarError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{parent}: CIFAR-10 could not be fetched from {URL}: {reason}. Without a network, "
            "unpack the archive there by other means"
        ) from error
    return folder


def _fetch(archive: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer, archive.open("wb") as out:
        size = int(answer.headers.get("Content-Length", 0)) or None
        with tqdm(desc="fetching CIFAR-10", total=size, unit="B", unit_scale=True) as bar:
            received = 0
            while chunk := answer.read(CHUNK):
                received += len(chunk)
                if received > SIZE:
                    raise DataError(f"{URL}: expected {SIZE:,} bytes, got more; nothing was kept")
                out.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    if digest.hexdigest() != MD5:
        raise DataError(
            f"{URL}: expected MD5 {MD5}, got {digest.hexdigest()}; nothing was unpacked"
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Write the named files alone: no other member of the archive, and no path that it states."""
    with tarfile.open(archive, "r:gz") as members:
        for name in cifar10.FILES:
            path = f"{cifar10.FOLDER}/{name}"
            try:
                member = members.getmember(path)
                source = members.extractfile(member) if member.isfile() else None
            except KeyError:
                source = None
            if source is None:
                raise DataError(f"{URL}: the archive has no file {path}")
            if member.size > UNPACKED:
                raise DataError(f"{URL}: expected at most {UNPACKED:,} bytes in {path}")
            with source, (folder / name).open("wb") as out:
                shutil.copyfileobj(source, out)
