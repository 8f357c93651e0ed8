"""Freed memory stays with the process, for the next step to take."""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # options of mallopt, by the numbers of glibc's malloc.h
LARGEST_TENSOR, LARGEST_KEPT = 2**30, 2**31 - 1  # bytes


def keep_freed() -> bool:
    """Have glibc's malloc keep what is freed; returns whether it does.

    A training step on a CPU frees large tensors and takes as many again. By default each goes back
    to the kernel at once, and comes anew as pages to be zeroed when they are first touched.
    Left alone are other C libraries, and settings that the environment makes itself (MALLOC_…,
    GLIBC_TUNABLES).
    """
    settled = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if settled or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_TENSOR) and mallopt(TRIM_THRESHOLD, LARGEST_KEPT))


def give_back() -> bool:
    """Have glibc's malloc give what is free to the kernel, once; returns whether it did.

    Each thread has free memory of its own, which no other takes.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    trim = getattr(libc, "malloc_trim", None)
    return trim is not None and bool(trim(0))
