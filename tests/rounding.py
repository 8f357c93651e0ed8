"""What rounding does to a computation, whatever the machine: a model of it, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Sizes = list[tuple[Tensor, Tensor]]  # of what is rounded, and what its rounding is multiplied by


@contextmanager
def rounded(dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Adds to each result of a float64 computation what rounding to `dtype` might add.

    That is half an epsilon times each of the result's sizes (SIZES), with signs that chance chooses
    by the seed. Attention is computed step by step.
    """
    with sdpa_kernel(SDPBackend.MATH), _Rounded(dtype, seed):
        yield


class _Rounded(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.half = torch.finfo(dtype).eps / 2
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **kwargs or {})
        is_view = any(each.alias_info is not None for each in operator._schema.returns)
        if is_view or operator.overloadpacket in EXACT:
            return result
        if isinstance(result, Tensor) and result.is_floating_point():
            one, known = result.new_ones(()), result.isfinite()
            sizes = SIZES.get(operator.overloadpacket, lambda result, *rest: [(result.abs(), one)])
            for size, factor in sizes(result, *args):
                sign = torch.randint(0, 2, size.shape, generator=self.generator) * 2 - 1
                result += torch.where(known, self.half * size * sign * factor, 0.0)
        return result


# What rounds nothing.
EXACT = {
    aten._to_copy, aten.abs, aten.cat, aten.clamp_min, aten.clone, aten.copy_,
    aten.diagonal_backward, aten.empty, aten.empty_like, aten.eye, aten.fill, aten.full,
    aten.full_like, aten.gather, aten.index, aten.linspace, aten.masked_fill, aten.neg,
    aten.new_zeros, aten.ones, aten.ones_like, aten.roll, aten.scalar_tensor, aten.scatter,
    aten.scatter_add, aten.select_backward, aten.slice_backward, aten.stack, aten.where,
    aten.zeros, aten.zeros_like,
}  # fmt: skip


def _sum(result: Tensor, terms: Tensor, squares: Tensor, count: int) -> Sizes:
    """Of `count` terms one after the other, from the sums of their sizes and of their squares.

    The roundings of the partial sums add up by chance: of those that grow steadily to the result,
    and twice, as in one of very many sums, of those that wander, or stay as large as one term.
    """
    partial = (count / 3) ** 0.5 * result.abs() + 2 * (count * squares).sqrt()
    return [(terms + partial, terms.new_ones(()))]


def _of_product(result: Tensor, a: Tensor, b: Tensor) -> Sizes:
    return _sum(result, a.abs() @ b.abs(), a.square() @ b.square(), a.shape[-1])


def _of_sum(result: Tensor, x: Tensor, *dims: Any, **options: Any) -> Sizes:
    terms, squares = aten.sum(x.abs(), *dims), aten.sum(x.square(), *dims)
    return _sum(result, terms, squares, x.numel() // max(1, result.numel()))


def _of_mean(result: Tensor, x: Tensor, *dims: Any) -> Sizes:
    count = x.numel() // max(1, result.numel())
    return [(size / count, one) for size, one in _of_sum(result * count, x, *dims)]


def _row(x: Tensor, dim: int) -> Tensor:
    """Of a row's sum of exponentials, relative to it: of one term after the other."""
    return torch.full_like(x.narrow(dim, 0, 1), 1 + (x.shape[dim] / 3) ** 0.5)


def _of_softmax(y: Tensor, x: Tensor, dim: int, *rest: Any) -> Sizes:
    """Of the exponents and the exponentials, and of a row's sum."""
    return [(y - torch.xlogy(y, y), y.new_ones(())), (_row(x, dim), y)]


def _of_log_softmax(y: Tensor, x: Tensor, dim: int, *rest: Any) -> Sizes:
    one = y.new_ones(())
    return [(y.abs(), one), (_row(x, dim), one)]


def _of_logsumexp(y: Tensor, x: Tensor, dims: list[int], keep: bool = False) -> Sizes:
    """Of the sum alone: a kernel keeps what the rounding of the logarithm would lose."""
    row = _row(x, dims[0])
    return [(row if keep else row.squeeze(dims[0]), y.new_ones(()))]


def _of_softmax_backward(result: Tensor, grad: Tensor, y: Tensor, dim: int, *rest: Any) -> Sizes:
    row = (y * grad.abs()).sum(dim, keepdim=True)
    return [(y * grad.abs(), result.new_ones(())), (row, y)]


def _of_log_softmax_backward(
    result: Tensor, grad: Tensor, y: Tensor, dim: int, *rest: Any
) -> Sizes:
    row = grad.abs().sum(dim, keepdim=True)
    return [(grad.abs() + (1 - y) * y.exp() * row, result.new_ones(())), (row, y.exp())]


# The sizes, by what an operator sums; all others have the result's own.
SIZES: dict[Any, Callable[..., Sizes]] = {
    aten.mm: _of_product,
    aten.bmm: _of_product,
    aten.sum: _of_sum,
    aten.mean: _of_mean,
    aten._softmax: _of_softmax,
    aten._safe_softmax: _of_softmax,
    aten._log_softmax: _of_log_softmax,
    aten.logsumexp: _of_logsumexp,
    aten._softmax_backward_data: _of_softmax_backward,
    aten._log_softmax_backward_data: _of_log_softmax_backward,
}  # fmt: skip
