"""Attention along one axis of an image (or of a line, or of a volume), in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gcrl_kernels import checks
from gcrl_kernels.axial_attention import ops
from gcrl_kernels.backends import choose
from gcrl_kernels.operators import autocast, check_reverse_mode

__all__ = ["axial_attention", "axial_attention_packed"]


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axis: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | Any:  # with a return_ flag a tuple
    """Softmax attention along one axis of a grid: softmax(scale q kᵀ + bias) v.

    Axial attention is Ho et al. 2019, arXiv 1912.12180.

    Args:
        q, k, v: [B, *grid, heads, D], floating point, one dtype; grid has 1 to 3 dimensions (an
            image: [B, H, W, heads, D]). Any strides.
        axis: the grid dimension to attend along: for an image 0 is down columns, 1 along rows;
            negative counts back within the grid. N is its length.
        causal: a position attends to itself and those before it.
        scale: of the scores, finite; 1/sqrt(D) by default.
        bias: [heads, N, N], floating point, added to the scaled scores; it may require a gradient.
        mask: bool [B, *grid]; True may be attended to. A query with nothing to attend to gives
            zeros. What k and v hold where it is False, NaN and infinity too, reaches nobody. (With
            `causal` alone a later position's NaN or infinity in v may reach earlier ones.)
        return_lse: also return each query's log-sum-exp of the scores, in nats, without a gradient.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the tensors'
            device.

    Returns:
        [B, *grid, heads, D], contiguous, in q's dtype (autocast's, where it is on); with
        return_lse also float32 [B, *grid, heads]. Scores are float32 (float64 for float64 inputs):
        a row with one beyond 3.4e38 is NaN.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device than stated.
        BackendUnavailableError: a backend asked for by name cannot serve here.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_floating(name, tensor)
    if not 4 <= q.dim() <= 6:
        raise checks.value_error(
            "q", "[B, *grid, heads, D] with a grid of 1 to 3 dimensions", checks.shape(q)
        )
    for name, tensor in (("k", k), ("v", v)):
        checks.check_shape(name, tensor, q.shape, "of q")
        checks.check_same_device(name, tensor, "q", q)
    q, k, v = autocast(q, k, v)
    for name, tensor in (("k", k), ("v", v)):
        checks.check_same_dtype(name, tensor, "q", q)
    options = _check_options("q", q, axis, causal, scale, bias, mask, return_lse)
    check_reverse_mode("axial_attention", q, k, v, bias)
    out, lse = ops.attend(q, k, v, *options, _choose(backend, q, axis))
    return (out, lse[0].float()) if return_lse else out


def axial_attention_packed(
    qkv: Tensor,
    axis: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | Any:  # with a return_ flag a tuple
    """`axial_attention` of a packed projection qkv [B, *grid, 3, heads, D]; so is its gradient.

    Arguments, result and errors are otherwise those of `axial_attention`. Unbinding a packed
    projection instead costs a concatenation in backward.
    """
    checks.check_floating("qkv", qkv)
    if not 5 <= qkv.dim() <= 7 or qkv.shape[-3] != 3:
        layout = "[B, *grid, 3, heads, D] with a grid of 1 to 3 dimensions"
        raise checks.value_error("qkv", layout, checks.shape(qkv))
    options = _check_options("qkv", qkv.select(-3, 0), axis, causal, scale, bias, mask, return_lse)
    (qkv,) = autocast(qkv)
    check_reverse_mode("axial_attention_packed", qkv, bias)
    out, lse = ops.attend_packed(qkv, *options, _choose(backend, qkv.select(-3, 0), axis))
    return (out, lse[0].float()) if return_lse else out


def _choose(backend: str | None, q: Tensor, axis: int) -> str:
    length, features = q.shape[:-2][axis % (q.dim() - 3) + 1], q.shape[-1]
    return choose(
        "axial_attention", backend, q, lambda name: ops.cannot(name, length, features, q.dtype)
    )


def _check_options(
    name: str,
    q: Tensor,  # [B, *grid, heads, D]
    axis: int,
    causal: bool,
    scale: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    return_lse: bool,
) -> tuple[Any, ...]:
    """The operators' options: bias, mask, axis (not negative), causal, scale."""
    grid, heads, features = q.shape[1:-2], q.shape[-2], q.shape[-1]
    axis = checks.integer("axis", axis)
    if not -len(grid) <= axis < len(grid):
        raise checks.value_error("axis", f"{-len(grid)} to {len(grid) - 1} for this grid", axis)
    axis %= len(grid)
    checks.check_flag("causal", causal)
    checks.check_flag("return_lse", return_lse)
    if features == 0:
        raise checks.value_error(name, "at least one feature a head", checks.shape(q))
    scale = checks.number("scale", features**-0.5 if scale is None else scale)
    if bias is not None:
        checks.check_floating("bias", bias)
        checks.check_shape("bias", bias, (heads, grid[axis], grid[axis]), "[heads, N, N]")
        checks.check_same_device("bias", bias, name, q)
    if mask is not None:
        checks.check_bool("mask", mask)
        checks.check_shape("mask", mask, q.shape[:-2], "[B, *grid]")
        checks.check_same_device("mask", mask, name, q)
    return bias, mask, axis, causal, scale
