"""The operators of NT-Xent: schemas, shapes and gradients.

`nt_xent` is the loss of the views of one process. The block operators are its parts, some rows
against some columns, from which the loss over several processes is put together, and the one
against a memory bank. The columns of `block_lse` get no gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gcrl_kernels.contrastive import reference
from gcrl_kernels.operators import accumulation_dtype, define, differentiate, once_differentiable


def _anchor_shapes(z0: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(z0.dtype)
    anchors = 2 * z0.shape[0]
    return z0.new_empty(anchors, dtype=dtype), z0.new_empty(anchors, dtype=dtype)


nt_xent = define(
    "nt_xent(Tensor z0, Tensor z1, Tensor? negatives, Tensor? temperature, "
    "float temperature_value, bool normalize, str backend) -> (Tensor, Tensor)",
    {"reference": reference.forward},
    lambda z0, *rest: _anchor_shapes(z0),
)
_nt_xent_backward = define(
    "nt_xent_backward(Tensor grad, Tensor z0, Tensor z1, Tensor? negatives, Tensor? temperature, "
    "Tensor lse, float temperature_value, bool normalize, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    {"reference": reference.backward},
    lambda grad, z0, z1, negatives, temperature, *rest: (
        z0.new_empty(z0.shape),
        z1.new_empty(z1.shape),
        grad.new_empty(()) if temperature is None else temperature.new_empty(()),
    ),
)
block_lse = define(
    "nt_xent_block_lse(Tensor rows, Tensor columns, Tensor? temperature, "
    "float temperature_value, int? diagonal, str backend) -> Tensor",
    {"reference": reference.block_lse},
    lambda rows, *rest: rows.new_empty(rows.shape[0]),
)
block_gradient = define(
    "nt_xent_block_gradient(Tensor rows, Tensor row_lse, Tensor row_grad, Tensor columns, "
    "Tensor? column_lse, Tensor? column_grad, Tensor? temperature, float temperature_value, "
    "int? diagonal, str backend) -> (Tensor, Tensor)",
    {"reference": reference.block_gradient},
    lambda rows, *rest: (rows.new_empty(rows.shape), rows.new_empty(())),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, temperature_value, normalize, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (temperature_value, normalize, backend)


def _gradient(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    dz0, dz1, dtemperature = _nt_xent_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dz0, dz1, None, dtemperature if ctx.needs_input_grad[3] else None, None, None, None


def _block_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, temperature_value, diagonal, backend = inputs
    ctx.save_for_backward(*tensors, output)
    ctx.options = (temperature_value, diagonal, backend)


def _block_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, columns, temperature, lse = ctx.saved_tensors
    drows, dtemperature = block_gradient(
        rows, lse, grad, columns, None, None, temperature, *ctx.options
    )
    if temperature is not None:
        dtemperature = dtemperature.to(temperature.dtype)
    return drows, None, dtemperature if ctx.needs_input_grad[2] else None, None, None, None


differentiate(nt_xent, _setup, _gradient)
differentiate(block_lse, _block_setup, _block_gradient)
for _operator in (_nt_xent_backward, block_gradient):
    once_differentiable(_operator, "nt_xent")
