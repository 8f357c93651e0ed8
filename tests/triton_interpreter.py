"""Triton's interpreter in a process of its own: whether Triton interprets is settled at import."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing


class Interpreter:
    """Calls functions there, "module:name"; they read and write the tensors that are here."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __call__(self, function: str, *arguments: Any) -> None:
        tensors = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        self.connection.send((function, tensors))
        error = self.connection.recv()
        if error is not None:
            raise RuntimeError(error)


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    before = dict(os.environ)
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    theirs.close()
    try:
        yield Interpreter(ours)
    finally:
        ours.close()  # which ends it
        process.join()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            module, _, name = function.partition(":")
            getattr(importlib.import_module(module), name)(*arguments)
        except Exception:
            connection.send(traceback.format_exc())
        else:
            connection.send(None)
        del arguments
