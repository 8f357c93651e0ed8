"""How the package's operators are registered: one way for every kernel.

An operator has one implementation, which takes the backend as its last argument. Its gradient is a
second operator; differentiating that one raises, since the kernels are once differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

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
        if not _autocasts(device):
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
    operator: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    function: str,
) -> Callable[..., Any]:
    """Give an operator of `function` its gradient; returns what to call in the operator's place.

    It is the operator, but for the transforms of torch.func, which do not know an operator's
    registered gradient: for them it is an autograd.Function of the same parts.
    """
    torch.library.register_autograd(
        operator.name(), backward, setup_context=setup_context, lib=_LIBRARY
    )

    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise no_forward_mode(function)

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """One by one: the kernels have no further batch dimension."""
        outputs = [
            call(
                *(
                    a.select(d, i) if isinstance(d, int) else a
                    for a, d in zip(arguments, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        stacked = tuple(map(torch.stack, zip(*outputs, strict=True)))
        return stacked, (0,) * len(stacked)

    members = {
        "forward": staticmethod(operator),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "vmap": staticmethod(vmap),
    }
    transformable: Any = type(operator.__name__, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        return transformable.apply(*arguments) if is_transformed() else operator(*arguments)

    return call


def once_differentiable(operator: Any, function: str) -> Callable[..., Any]:
    """Make a backward through `operator`, itself the gradient of `function`, raise and say so.

    Returns the function to call in the operator's place, as `differentiate` does.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{function} is once differentiable: its gradient has no derivative")

    return differentiate(operator, setup_context, backward, function)


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is under way."""
    return torch._C._are_functorch_transforms_active()


def check_reverse_mode(function: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries a tangent, of which an operator would silently make a zero."""
    if forward_ad._current_level < 0 or is_transformed():  # a transform calls jvp, which raises
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise no_forward_mode(function)


def no_forward_mode(function: str) -> NotImplementedError:
    return NotImplementedError(
        f"{function} has no forward-mode derivative (torch.func.jvp, jacfwd, forward AD): use "
        "reverse mode (torch.func.grad, vjp, jacrev, backward)"
    )


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What a forward saved, read once: activation checkpointing hands it out once.

    Raises RuntimeError where the memory of one has been freed since.
    """
    saved: tuple[Any, ...] = ctx.saved_tensors
    if not all(has_storage(tensor) for tensor in saved if tensor is not None):
        raise RuntimeError("the storage of a tensor that was saved for backward was freed")
    return saved


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor's memory, where it is to have some, is there: it may have been freed."""
    stands_for_another = type(tensor) not in (Tensor, nn.Parameter)  # in a compiler, say
    if stands_for_another or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    there, count = tensor.untyped_storage().nbytes(), tensor.numel()
    if there >= (tensor.storage_offset() + count) * tensor.itemsize or count == 0:
        return True
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return there >= (tensor.storage_offset() + last + 1) * tensor.itemsize


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel computes: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_bool(mask: Tensor) -> Tensor:
    """A bool mask whose bytes are all 0 or 1; others, which a view may bring in, count as True."""
    return mask.view(torch.uint8).ne(0)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on for their device (never float64)."""
    device = tensors[0].device.type
    if not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def as_autocast(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor, where autocast is on in the dtype of the other."""
    return tensor.to(other.dtype) if _autocasts(other.device.type) else tensor


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Where autocast is on, the tensors in the widest of their dtypes: none of them loses any."""
    if not _autocasts(tensors[0].device.type):
        return tensors
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    return tuple(tensor.to(dtype) for tensor in tensors)


def _autocasts(device: str) -> bool:
    """Meta tensors know no autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)
