"""Arguments that have to be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from .strategies import FUNCTIONS, Call, Draw

OPTIONAL = {"mask", "bias", "palette", "negatives", "scale", "backend", "group"}
NUMBERS = {"scale", "label_smoothing", "z_loss", "temperature", "logit_scale"}
INTEGERS = {"axis", "colors", "seed", "iterations", "width", "heads"}
FLAGS = {"causal", "return_lse", "return_z_loss", "inplace_backward", "normalize"}
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "axis": (9, -9), "colors": (0, -1, 10**6), "iterations": (-1,), "heads": (0, -1),
    "label_smoothing": (-0.1, 1.5), "z_loss": (-1.0,), "temperature": (0.0, 0),
}  # fmt: skip


def emptied(tensor: Tensor) -> Tensor:
    """Without the memory that it had."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.float().contiguous().to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "emptied": emptied,
    "on no device": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "further dimension": lambda t: t.unsqueeze(-1),
    "an array": lambda t: t.float().numpy(),
    "a list": lambda t: t.tolist(),
}


def of_tensor(d: Draw, name: str, value: Tensor, alone: bool) -> Any:
    kinds = [*ODD, "a string", "a number", "another dtype"]
    if name in ("temperature", "logit_scale") or (name == "bias" and value.dim() == 0):
        kinds = ["sparse", "fake", "emptied", "complex", "a list of two", "two", "an integer"]
    if name in ("temperature", "logit_scale", "bias") and value.dim() == 0:
        kinds = [kind for kind in kinds if kind != "sparse"]
    if alone or name == "temperature":
        kinds = [kind for kind in kinds if kind != "on no device"]
    if value.dim() == 0:
        kinds = [kind for kind in kinds if kind not in ("nested", "jagged", "a list", "mkldnn")]
    if name not in OPTIONAL:
        kinds.append("None")
    kind = d.one(*kinds)
    plain: dict[str, Any] = {
        "a string": "text", "a number": 0.5, "None": None, "a list of two": [1.0, 2.0],
        "two": torch.ones(2), "an integer": torch.ones((), dtype=torch.int64),
    }  # fmt: skip
    if kind == "another dtype":
        return value.float() if value.dtype == torch.bool else value.to(torch.bool)
    if kind in plain:
        return plain[kind]
    try:
        return ODD[kind](value)
    except RuntimeError:  # PyTorch has none of this shape or dtype
        reject()


def of_other(d: Draw, name: str) -> Any:
    if name in NUMBERS:
        bad = [True, "x", [1.0], 1j, np.bool_(True), np.zeros(2), *OUT_OF_RANGE.get(name, ())]
        bad += [torch.nan, np.float64("nan"), torch.inf, -torch.inf, np.float32("inf"), 10**400]
    elif name in INTEGERS:
        bad = [True, 1.5, "1", [1], np.bool_(True), np.float64(1), *OUT_OF_RANGE.get(name, ())]
    elif name in FLAGS:
        bad = [1, "yes", 0.0, torch.ones(2)]
    elif name == "group":
        bad = ["world", 0]
    else:
        bad = ["other", 3, ["mean"], True, b"mean", torch.ones(2)]
    return d.one(*bad, *([] if name in OPTIONAL else [None]))


@st.composite
def wrong_calls(draw: Any, function: str) -> tuple[Call, str]:
    """A call, and which of its arguments is wrong."""
    d = Draw(draw)
    call = FUNCTIONS[function](d)
    # Of NumPy's numbers nothing here: that they are taken is the right calls' matter.
    arguments = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in call.arguments.items()
    }
    if "Loss" not in function and function != "AxialSelfAttention":
        arguments.setdefault("backend", None)
    if function in ("nt_xent", "dcl", "info_nce"):
        arguments |= {"group": None, "gather": "all"}
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    full = [name for name in tensors if arguments[name].numel()]
    others = [
        name for name, value in arguments.items()
        if name not in tensors and name not in ("mask", "palette", "negatives", "bias")
    ]  # fmt: skip
    name = d.one(*full, *others)
    value = arguments[name]
    if name in full:
        arguments[name] = of_tensor(d, name, value, alone=len(tensors) == 1)
    else:
        arguments[name] = of_other(d, name)
    return Call(function, arguments), name
