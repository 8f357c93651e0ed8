"""How the kernels' tests compare: as accurate as plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gcrl_kernels.backends import IMPLEMENTED, unavailable

Function = Callable[..., Tensor]


def backends_here(operator: str, device: str = "cpu") -> list[str]:
    """The backends that can run an operator on a device of this machine."""
    serves = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}[device]
    return [b for b in IMPLEMENTED[operator] if b in serves and unavailable(b) is None]


def values_and_gradients(
    function: Function, inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The function's output and the gradient of each input, all inputs taken in `dtype`.

    The upstream gradient is uneven, and the same in every dtype.
    """
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    output = function(*leaves)
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64).view(output.shape)
    gradients = torch.autograd.grad(output, leaves, weights.to(output.dtype))
    return [output.detach(), *gradients]


def assert_as_accurate(
    ours: Function,
    plain: Function,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    scale: float = 0.0,
) -> None:
    """Output and gradients: error against float64 at most twice plain PyTorch's, and a rounding.

    The rounding is of the largest value among all of them, or of `scale`: the size of what the
    results are sums of, where that may cancel.
    """
    inputs = [tensor.to(dtype) for tensor in inputs]
    exact = values_and_gradients(plain, inputs, torch.float64)
    plainly = values_and_gradients(plain, inputs, dtype)
    actual = values_and_gradients(ours, inputs, dtype)
    largest = max(scale, *(float(value.abs().max()) for value in exact))
    rounding = 4 * torch.finfo(dtype).eps * largest
    for index, (value, reference, expected) in enumerate(zip(actual, plainly, exact, strict=True)):
        assert value.shape == expected.shape
        assert value.is_contiguous()
        if index > 0:
            assert value.dtype == dtype
        error = (value.double() - expected).abs().max()
        allowed = 2 * (reference.double() - expected).abs().max() + rounding
        what = "the output" if index == 0 else f"the gradient of input {index - 1}"
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
