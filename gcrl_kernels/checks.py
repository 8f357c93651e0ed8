"""What the public functions check of their arguments. No check reads a tensor's values."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

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
    if not isinstance(value, Tensor):
        raise type_error(name, "a tensor", type(value).__name__)


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


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise type_error(name, "a number", type(value).__name__)
    # not math.isfinite, which cannot be traced where a number is dynamic
    if not abs(value) <= sys.float_info.max:
        raise value_error(name, "a finite number", value)


def check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise type_error(name, "an integer", type(value).__name__)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise type_error(name, "True or False", type(value).__name__)


def check_at_least(name: str, value: float, least: float) -> None:
    check_number(name, value)
    if not value >= least:
        raise value_error(name, f"at least {least}", value)
