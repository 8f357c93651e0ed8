"""One process at a time works in a folder; the system lets go when that process ends."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gcrl.config import ConfigError

FILE = ".lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from the folder, which is made if it is not there.

    Raises ConfigError, which names the owner, where another process has it. A folder that was made
    and holds nothing at the end is removed.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with _locked(path, folder) as file:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                for each in made:
                    each.rmdir()


def _locked(path: Path, folder: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            file.close()
            raise ConfigError(
                f"{folder} is in use by {owner}: wait until it ends, or choose another folder "
                "with --out"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"gcrl: {path}: cannot be locked: {error}", file=sys.stderr)
            return file
        # Its last owner may have removed it between our opening and locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
