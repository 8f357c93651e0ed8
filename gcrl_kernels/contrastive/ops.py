"""The operators of the contrastive losses: schemas, shapes and gradients.

`contrast` is any of the losses of one process's views, told apart by the candidates and by whether
there are classes (see reference.py). The block operators are its parts, some rows against some
columns, from which the loss over several processes is put together, and the one against a memory
bank. The columns of `block_lse` get no gradient; nor has its second row, the residual, one.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from gcrl_kernels.contrastive import reference
from gcrl_kernels.contrastive.launch import Implementation, implementation
from gcrl_kernels.operators import (
    accumulation_dtype,
    define,
    differentiate,
    once_differentiable,
    saved_tensors,
)

IMPLEMENTATIONS = {
    "reference": Implementation(
        reference.forward, reference.backward, reference.block_lse, reference.block_gradient
    ),
    "cpu": implementation(lambda: torch.ops.gcrl_kernels_cpu),
    "cuda": implementation(lambda: torch.ops.gcrl_kernels_cuda),
    # Imported at the first call: not every machine has Triton.
    "triton": implementation(lambda: importlib.import_module(f"{__package__}.triton.launchers")),
}

_SCALE = "Tensor? scale"
_OPTIONS = "float scale_value, str candidates"


def cannot(backend: str, dtype: torch.dtype) -> str | None:
    """Why a backend's kernels do not take embeddings of this dtype."""
    if backend == "reference" or dtype != torch.float64:
        return None
    return f"it takes float16, bfloat16 and float32, got {dtype}"


def _anchor_shapes(z0: Tensor, z1: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(z0.dtype)
    anchors = z0.shape[0] if z1 is None else 2 * z0.shape[0]
    return z0.new_empty(anchors, dtype=dtype), z0.new_empty(2, anchors, dtype=dtype)


def _scale_shape(like: Tensor, scale: Tensor | None) -> Tensor:
    return like.new_empty(()) if scale is None else scale.new_empty(())


contrast = define(
    "contrast(Tensor z0, Tensor? z1, Tensor? negatives, Tensor? classes, Tensor? share, "
    f"{_SCALE}, {_OPTIONS}, bool normalize, str backend) -> (Tensor, Tensor)",
    {name: each.forward for name, each in IMPLEMENTATIONS.items()},
    lambda z0, z1, *rest: _anchor_shapes(z0, z1),
)
_contrast_backward = define(
    "contrast_backward(Tensor grad, Tensor z0, Tensor? z1, Tensor? negatives, Tensor? classes, "
    f"Tensor? share, {_SCALE}, Tensor lse, {_OPTIONS}, bool normalize, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    {name: each.backward for name, each in IMPLEMENTATIONS.items()},
    lambda grad, z0, z1, negatives, classes, share, scale, *rest: (
        z0.new_empty(z0.shape),
        z0.new_empty(0 if z1 is None else z1.shape),
        _scale_shape(grad, scale),
    ),
)
block_lse = define(
    f"contrast_block_lse(Tensor rows, Tensor columns, {_SCALE}, {_OPTIONS}, int? diagonal, "
    "str backend) -> Tensor",
    {name: each.block_lse for name, each in IMPLEMENTATIONS.items()},
    lambda rows, *rest: rows.new_empty(2, rows.shape[0]),
)
block_gradient = define(
    "contrast_block_gradient(Tensor rows, Tensor row_lse, Tensor row_grad, Tensor columns, "
    f"Tensor? column_lse, Tensor? column_grad, {_SCALE}, {_OPTIONS}, int? diagonal, str backend) "
    "-> (Tensor, Tensor)",
    {name: each.block_gradient for name, each in IMPLEMENTATIONS.items()},
    lambda rows, *rest: (rows.new_empty(rows.shape), rows.new_empty(())),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale_value, candidates, normalize, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (scale_value, candidates, normalize, backend)


def _gradient(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = saved_tensors(ctx)
    dz0, dz1, dscale = _differentiate(grad, *saved, *ctx.options)
    dz1, dscale = (d if of is not None else None for d, of in ((dz1, saved[1]), (dscale, saved[5])))
    return dz0, dz1, *[None] * 3, dscale, *[None] * 4


def _block_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale_value, candidates, diagonal, backend = inputs
    ctx.save_for_backward(*tensors, output)
    ctx.options = (scale_value, candidates, diagonal, backend)


def _block_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, columns, scale, lse = saved_tensors(ctx)
    drows, dscale = _differentiate_block(
        rows, lse, grad[0], columns, None, None, scale, *ctx.options
    )
    if scale is not None:
        dscale = dscale.to(scale.dtype)
    return drows, None, dscale if scale is not None else None, *[None] * 4


differentiable = differentiate(contrast, _setup, _gradient, "a contrastive loss")
differentiable_block_lse = differentiate(
    block_lse, _block_setup, _block_gradient, "a contrastive loss"
)
_differentiate = once_differentiable(_contrast_backward, "a contrastive loss")
_differentiate_block = once_differentiable(block_gradient, "a contrastive loss")
