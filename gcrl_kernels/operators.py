"""How the package's operators are registered: one way for every kernel.

An operator has one implementation, which takes the backend as its last argument. Its gradient is a
second operator; differentiating that one raises, since the kernels are once differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "gcrl_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str, implementations: Mapping[str, Callable[..., Any]], fake: Callable[..., Any]
) -> Any:
    """Define an operator: its schema, an implementation for each backend, the shapes it returns.

    The schema's last argument is the backend; the implementations and `fake` do without it.
    """
    name = schema.split("(", 1)[0]

    def run(*arguments: Any) -> Any:
        *rest, backend = arguments
        device = rest[0].device.type
        if not torch.is_autocast_enabled(device):
            return implementations[backend](*rest)
        # The kernels choose their own precision: autocast must not reach into them, nor into a
        # backward.
        with torch.autocast(device, enabled=False):
            return implementations[backend](*rest)

    def run_fake(*arguments: Any) -> Any:
        return fake(*arguments[:-1])

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", run_fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiate(
    operator: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Give an operator its gradient."""
    torch.library.register_autograd(
        operator.name(), backward, setup_context=setup_context, lib=_LIBRARY
    )


def once_differentiable(operator: Any, function: str) -> None:
    """Make a backward through `operator`, itself the gradient of `function`, raise and say so."""

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{function} is once differentiable: its gradient has no derivative")

    torch.library.register_autograd(operator.name(), backward, lib=_LIBRARY)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel computes: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_bool(mask: Tensor) -> Tensor:
    """A bool mask whose bytes are all 0 or 1; others, which a view may bring in, count as True."""
    return mask.view(torch.uint8).ne(0)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on for their device (never float64)."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
