"""NT-Xent over the views of every process in a group.

Each process has its own rows and meets everyone's columns: z is gathered (or passed around a ring),
then each row's log-sum-exp. Column k's own loss pulls at row i with exp(s_ik - lse_k), so lse is
all that a process needs from the others to have its rows' whole gradient, and no gradient travels
back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gcrl_kernels.contrastive import ops, reference


class _AnchorLosses(torch.autograd.Function):
    """Each own anchor's loss against the views of every process, [2N].

    `same_gradient` says that every anchor of every process gets the same upstream gradient, as
    under a mean or a sum; otherwise those are gathered in backward. Raises ValueError where the
    processes have embeddings of different shapes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,  # [2N, D], normalised where that is asked for, in the accumulation dtype
        negatives: Tensor | None,  # [M, D], likewise
        temperature: Tensor | None,
        temperature_value: float,
        group: dist.ProcessGroup,
        gather: str,
        same_gradient: bool,
        backend: str,
    ) -> Tensor:
        check_same_shape("z0, z1", len(z) // 2, z, group)
        tau = (temperature, temperature_value)
        gathered = all_gather(z, group) if gather == "all" else None
        blocks = _ring((z,), group)
        if gathered is not None:
            blocks = iter([(dist.get_rank(group) * len(z), (gathered,))])
        lse = z.new_full((len(z),), -torch.inf)
        for diagonal, (columns,) in blocks:
            lse = lse.logaddexp(ops.block_lse(z, columns, *tau, diagonal, backend))
        if negatives is not None:
            lse = lse.logaddexp(ops.block_lse(z, negatives, *tau, None, backend))
        gathered_lse = all_gather(lse, group) if gather == "all" else None
        ctx.save_for_backward(z, negatives, temperature, lse, gathered, gathered_lse)
        ctx.options = (temperature_value, group, same_gradient, backend)
        return lse - reference.positive_scores(z) / (
            temperature_value if temperature is None else temperature.to(z.dtype)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        z, negatives, temperature, lse, gathered, gathered_lse = ctx.saved_tensors
        temperature_value, group, same_gradient, backend = ctx.options
        tau = (temperature, temperature_value)
        dz, dtemperature = reference.positive_gradient(z, grad, *tau)
        for diagonal, (columns, column_lse, column_grad) in _columns(
            z, lse, grad, gathered, gathered_lse, group, same_gradient
        ):
            part, dtemperature_part = ops.block_gradient(
                z, lse, grad, columns, column_lse, column_grad, *tau, diagonal, backend
            )
            dz, dtemperature = dz + part, dtemperature + dtemperature_part
        if negatives is not None:
            part, dtemperature_part = ops.block_gradient(
                z, lse, grad, negatives, None, None, *tau, None, backend
            )
            dz, dtemperature = dz + part, dtemperature + dtemperature_part
        if temperature is not None:
            dtemperature = dtemperature.to(temperature.dtype)
        return dz, None, dtemperature if ctx.needs_input_grad[2] else None, *[None] * 5


anchor_losses = torch.compiler.disable(_AnchorLosses.apply)


def _columns(
    z: Tensor,
    lse: Tensor,
    grad: Tensor,
    gathered: Tensor | None,
    gathered_lse: Tensor | None,
    group: dist.ProcessGroup,
    same_gradient: bool,
) -> Iterator[tuple[int | None, tuple[Tensor, ...]]]:
    """Blocks of columns z with their lse and upstream gradients: all gathered, or one a process."""
    if gathered is None or gathered_lse is None:
        yield from _ring((z, lse, grad.contiguous()), group)
    else:
        all_grad = grad[:1].expand_as(gathered_lse) if same_gradient else all_gather(grad, group)
        yield dist.get_rank(group) * len(z), (gathered, gathered_lse, all_grad)


def _ring(
    tensors: tuple[Tensor, ...], group: dist.ProcessGroup
) -> Iterator[tuple[int | None, tuple[Tensor, ...]]]:
    """The tensors of this process, then those of the one before it in the ring, and so on.

    With each comes the column of row 0 itself, None where they are another process's.
    """
    ranks = dist.get_process_group_ranks(group)
    rank, size = dist.get_rank(group), len(ranks)
    following, previous = ranks[(rank + 1) % size], ranks[(rank - 1) % size]
    for step in range(size):
        yield (0 if step == 0 else None), tensors
        if step + 1 < size:
            received = tuple(torch.empty_like(tensor) for tensor in tensors)
            transfers = [dist.P2POp(dist.isend, t, following, group) for t in tensors]
            transfers += [dist.P2POp(dist.irecv, t, previous, group) for t in received]
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
            tensors = received


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts)


def check_same_shape(names: str, count: int, z: Tensor, group: dist.ProcessGroup) -> None:
    """Raise ValueError unless every process has as many images, `count`, and features, z's last."""
    shape = torch.tensor([[count, z.shape[-1]]], device=z.device)
    shapes = all_gather(shape, group).tolist()
    if any(other != shapes[0] for other in shapes):
        views = ", ".join(f"rank {rank} has [{n}, {d}]" for rank, (n, d) in enumerate(shapes))
        raise ValueError(f"{names}: expected the same shape [N, D] on every rank, got: {views}")
