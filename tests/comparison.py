"""How the kernels' tests compare: as accurate as plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rounding import rounded
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
    ours: Function, plain: Function, inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Output and gradients: error against float64 at most twice plain PyTorch's, and a rounding.

    Plain PyTorch's error in `dtype` is luck: of the order of its sums, of the instructions of one
    machine. It is the error here of its formula in float64 with every step rounded as in `dtype`,
    by chance (rounding.py): what the condition of the problem makes of such roundings. So it allows
    the same on every machine, also where results cancel, or exponents are large. The rounding is
    four epsilons of the result's own largest value.
    """
    inputs = [tensor.to(dtype) for tensor in inputs]
    exact = values_and_gradients(plain, inputs, torch.float64)
    errors = errors_of_rounding(plain, inputs, dtype, exact)
    actual = values_and_gradients(ours, inputs, dtype)
    for index, (value, expected, plainly) in enumerate(zip(actual, exact, errors, strict=True)):
        assert value.shape == expected.shape
        assert value.is_contiguous()
        if index > 0:
            assert value.dtype == dtype
        numbers = torch.finfo(value.dtype)
        largest = max(float(expected.abs().max()), numbers.smallest_normal)
        error = (value.double() - expected).abs().max()
        allowed = 2 * plainly + 4 * numbers.eps * largest
        what = "the output" if index == 0 else f"the gradient of input {index - 1}"
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def errors_of_rounding(
    plain: Function, inputs: Sequence[Tensor], dtype: torch.dtype, exact: Sequence[Tensor]
) -> list[float]:
    """Of the output and each gradient: the largest error of some `rounded` computations."""
    errors = [0.0] * len(exact)
    few = sum(value.numel() for value in exact) < 1000  # of which none may be lucky
    for seed in range(8 if few else 2):
        with rounded(dtype, seed):
            values = values_and_gradients(plain, inputs, torch.float64)
        errors = [
            max(error, float((value - each).abs().max()))
            for error, value, each in zip(errors, values, exact, strict=True)
        ]
    return errors
