"""Pickles of plain values and arrays of bytes, read without pickle's machine.

That machine runs what a file names, allocates what it announces and can be kept busy for ever by
a few hundred bytes. This one knows the opcodes that CIFAR-10's files are made of, looks nothing
up, and takes a number of steps that is bounded.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from gcrl.data.budget import Budget
from gcrl.data.dataset import DataError

STEPS = 2_000_000  # opcodes in a file, at most; those of CIFAR-10 have 51,000
COPIES = 6  # of the file's bytes, while a string in it becomes an array
STEP_BYTES = 200  # that an opcode leaves behind, at most


class PickleError(ValueError):
    """A pickle that holds anything else."""


def read_pickle(file: Path) -> Any:
    """The contents of a file of CIFAR-10, without running anything that the file names.

    Strings come as bytes and arrays as uint8. Raises DataError if the file is damaged, is too
    large for the budget, or holds anything else than plain values and arrays of bytes.
    """
    try:
        size = file.stat().st_size
        with Budget().lend(COPIES * size + min(size, STEPS) * STEP_BYTES):
            return _Machine().run(file.read_bytes())
    except DataError as error:
        raise DataError(f"{file}: {error}") from error.__cause__
    except Exception as error:  # a damaged pickle fails wherever its bytes lead
        reason = str(error) or type(error).__name__
        raise DataError(f"{file}: not a file of CIFAR-10, or damaged: {reason}") from error


class _Dtype:
    """Stands in for numpy.dtype: only unsigned bytes occur."""


class _Array:
    """Stands in for numpy.ndarray, until its bytes come."""

    value: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        """Take the shape and the bytes, as NumPy writes them beside three other values."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise PickleError("expected an array as NumPy writes it")
        _, shape, dtype, by_columns, content = state
        if not isinstance(dtype, _Dtype) or by_columns is not False or type(content) is not bytes:
            raise PickleError("expected an array of bytes in C order")
        if (
            not isinstance(shape, tuple)
            or len(shape) > 4
            or not all(type(side) is int and side >= 0 for side in shape)
        ):
            raise PickleError("expected an array of 4 dimensions at most")
        self.value = np.frombuffer(content, dtype=np.uint8).reshape(shape)


# What NumPy's arrays are written with; any other name is refused, not looked up.
NAMES: dict[tuple[object, object], type] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): object,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
}
MARK = object()


class _Machine:
    """A stack of values and a memo, as pickle has them; each opcode does what it does there."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        push = self.stack.append
        for step, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
            name, value = opcode.name, cast(Any, argument)
            if step >= STEPS:
                raise PickleError(f"expected at most {STEPS:,} values")
            if name in LITERALS:
                push(value)
            elif name in STRINGS:  # bytes, which pickletools has decoded
                push(value.encode("latin-1"))
            elif name in FRESH:
                push(FRESH[name]())
            elif name in TUPLES:
                push(tuple(self.take(TUPLES[name])))
            elif name in PUTS:
                self.memo[len(self.memo) if value is None else value] = self.stack[-1]
            elif name in GETS:
                push(self.memo[value])
            elif name in ACTIONS:
                ACTIONS[name](self, value)
            elif name not in NOTHING:
                raise PickleError(f"it has the opcode {name}, which CIFAR-10 does not need")
        (contents,) = self.stack
        if type(contents) is not dict:
            return contents
        return {k: v.value if isinstance(v, _Array) else v for k, v in contents.items()}

    def take(self, count: int | None = None) -> list[Any]:
        """The uppermost values, so many or all above the last mark, which goes with them."""
        start = len(self.stack)
        if count is not None:
            start -= count
            if start < 0:
                raise PickleError("it takes more values than there are")
            values = self.stack[start:]
            if any(value is MARK for value in values):
                raise PickleError("a mark is out of place")
        else:
            while self.stack[start - 1] is not MARK:
                start -= 1
                if start == 0:
                    raise PickleError("a mark is missing")
            values = self.stack[start:]
            start -= 1
        del self.stack[start:]
        return values

    def append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise PickleError("it appends to what is no list")
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        keys = values[::2]
        if type(self.stack[-1]) is not dict or not all(type(key) in (bytes, str) for key in keys):
            raise PickleError("expected a dict, with strings for keys")
        self.stack[-1].update(zip(keys, values[1::2], strict=True))

    def name(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickleError("it asks for what is no name")
        if (module, name) not in NAMES:
            asked = f"{module}.{name}"[:200]
            raise PickleError(f"it asks for {asked}, which CIFAR-10 does not need")
        self.stack.append(NAMES[module, name])

    def call(self) -> None:
        function, arguments = self.take(2)
        if function is _Dtype and type(arguments) is tuple and arguments[:1] in ((b"u1",), ("u1",)):
            self.stack.append(_Dtype())
        elif function is _Array:
            self.stack.append(_Array())
        else:
            raise PickleError("expected an array of unsigned bytes, got another")

    def build(self) -> None:
        (state,) = self.take(1)
        if type(self.stack[-1]) is _Array:
            self.stack[-1].fill(state)
        elif type(self.stack[-1]) is not _Dtype:
            raise PickleError("expected an array, got another object")


LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: MARK,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
GETS = {"GET", "BINGET", "LONG_BINGET"}
NOTHING = {"PROTO", "FRAME", "STOP"}


def _dict(machine: _Machine, _: object) -> None:
    values = machine.take()
    machine.stack.append({})
    machine.set_items(values)


ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "LIST": lambda machine, _: machine.stack.append(machine.take()),
    "DICT": _dict,
    "APPEND": lambda machine, _: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append(machine.take()),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.take()),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.take(2)),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}
