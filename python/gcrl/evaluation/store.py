"""Arrays that are kept beside a run, under a hash of all that they follow from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import Tensor

from gcrl.checkpoint import replace_file
from gcrl.evaluation.options import stamp

FORMAT = 3  # to be raised when what is computed changes
DIGEST_BYTES = hashlib.sha256().digest_size


class Store:
    """A folder of arrays (.npy) and of networks (.safetensors). A damaged file counts as absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, kind: str, ingredients: Sequence[bytes], compute: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """The array of that kind that follows from the ingredients; computed where it is absent."""
        path = self.path(kind, ingredients)
        stored = self.read(path)
        if stored is not None:
            array: np.ndarray = np.load(io.BytesIO(stored), allow_pickle=False)
            return array
        array = compute()
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        self.write(path, content.getvalue())
        return array

    def network(self, path: Path) -> dict[str, Tensor] | None:
        """The tensors of a file of the store by name; None where it is absent."""
        content = self.read(path)
        return None if content is None else safetensors.torch.load(content)

    def path(self, kind: str, ingredients: Sequence[bytes], suffix: str = ".npy") -> Path:
        """The file of what follows from the ingredients."""
        return self.folder / f"{kind}-{digest(str(FORMAT).encode(), *ingredients)[:32]}{suffix}"

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the store: whole, or not at all; its SHA-256 follows the content."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, content + hashlib.sha256(content).digest())

    def read(self, path: Path) -> bytes | None:
        """The content of a file of the store; None where it is absent or damaged."""
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        content, own = stored[:-DIGEST_BYTES], stored[-DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == own else None


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts, each with its length, so that no two lists of parts read the same."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "big"))
        sha.update(part)
    return sha.hexdigest()


def content_digest(source: str) -> str:
    """A hash of what a file, or all files in a folder, hold: it changes when that does."""
    return digest(*(digest(Path(str(file)).read_bytes()).encode() for file, *_ in stamp(source)))


def array_digest(array: np.ndarray | None) -> bytes:
    """A hash of an array's type, shape and values."""
    if array is None:
        return b"none"
    parts = (str(array.dtype).encode(), str(array.shape).encode(), array.tobytes())
    return digest(*parts).encode()
