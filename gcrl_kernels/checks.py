"""What the public functions check of their arguments. No check reads a tensor's values."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gcrl_kernels.operators import has_storage

Number = TypeVar("Number", int, float)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")


def value_error(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}")


def type_error(name: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{name}: expected {expected}, got {got}")


def shape(tensor: Tensor) -> str:
    return "[" + ", ".join([str(size) for size in tensor.shape]) + "]"


def check_tensor(name: str, value: object) -> None:
    """Raise unless it is a dense tensor whose memory is there."""
    if not isinstance(value, Tensor):
        raise type_error(name, "a tensor", type(value).__name__)
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        raise type_error(name, "a dense tensor", f"a {kind} one")
    if not torch.compiler.is_compiling() and not has_storage(value):
        raise type_error(name, "a tensor that has its memory", "one whose storage was freed")


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], expected: str) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        raise type_error(name, expected, tensor.dtype)


def check_floating(name: str, tensor: Tensor) -> None:
    check_dtype(
        name, tensor, FLOATS, "a floating-point tensor (float16, bfloat16, float32, float64)"
    )


def check_bool(name: str, tensor: Tensor) -> None:
    check_dtype(name, tensor, (torch.bool,), "a tensor of dtype torch.bool")


def check_dimensions(name: str, tensor: Tensor, dimensions: int, layout: str) -> None:
    if tensor.dim() != dimensions:
        raise value_error(name, f"{dimensions} dimensions {layout}", shape(tensor))


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], layout: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        sizes = ", ".join([str(size) for size in expected])
        raise value_error(name, f"shape {layout} = [{sizes}]", shape(tensor))


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise value_error(name, f"the device of {other_name} ({other.device})", tensor.device)


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise type_error(name, f"the dtype of {other_name} ({other.dtype})", tensor.dtype)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise value_error(
            name, "one of " + ", ".join([repr(choice) for choice in choices]), repr(value)
        )


def number(name: str, value: Any) -> float:
    """A finite number as a float, from whatever has one's value: NumPy's too."""
    if type(value) not in (int, float):  # which may be symbols that a compiler traces
        known = hasattr(value, "__float__") and not isinstance(value, (bool, np.bool_))
        if not known or not _is_one_number(value):
            raise type_error(name, "a number", type(value).__name__)
        value = float(value)
    # not math.isfinite, which cannot be traced where a number is dynamic
    if not abs(value) <= sys.float_info.max:
        raise value_error(name, "a finite number", value)
    return value if type(value) is float else float(value)


def integer(name: str, value: Any) -> int:
    """An integer as an int, from whatever has one's value: NumPy's too."""
    if type(value) is int:
        return value
    known = hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_))
    if not known or not _is_one_number(value):
        raise type_error(name, "an integer", type(value).__name__)
    return operator.index(value)


def _is_one_number(value: Any) -> bool:
    """Of NumPy's and PyTorch's arrays one element without a gradient, which is not waited for."""
    if isinstance(value, Tensor):
        floats = value.dtype.is_floating_point or value.dtype in INTEGERS
        return (
            floats and value.numel() == 1 and value.device.type == "cpu" and not value.requires_grad
        )
    return not isinstance(value, np.ndarray) or value.ndim == 0


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise type_error(name, "True or False", type(value).__name__)


def at_least(name: str, value: Number, least: float) -> Number:
    if not value >= least:
        raise value_error(name, f"at least {least}", value)
    return value
