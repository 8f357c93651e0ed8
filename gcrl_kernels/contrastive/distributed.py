"""The contrastive losses over the views of every process in a group.

Each process has its own rows and meets everyone's columns: z is gathered (or exchanged with one
process at a time), then each row's log-sum-exp. Column k's own loss pulls at row i with
exp(s_ik - lse_k), so lse is all that a process needs from the others to have its rows' whole
gradient, and no gradient travels back. Positives are always of the same process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from gcrl_kernels.contrastive import ops, reference
from gcrl_kernels.operators import saved_tensors
from gcrl_kernels.softmax import split

# A meeting: which rows, the column where their own batch begins or None, the columns' tensors.
_Meeting = tuple[slice, int | None, tuple[Tensor, ...]]


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
        scale: Tensor | None,
        scale_value: float,
        candidates: str,
        group: dist.ProcessGroup,
        gather: str,
        same_gradient: bool,
        backend: str,
    ) -> Tensor:
        call = Call(len(z) // 2, z.shape[1], str(z.dtype), candidates, gather, scale_value)
        check_same_call("z0, z1", call, group, z.device)
        options = (scale, scale_value, candidates)
        gathered = _gathered(z, candidates, group) if gather == "all" else []
        exact = z.new_full((len(z),), -torch.inf, dtype=torch.float64)
        for rows, diagonal, (columns,) in _meetings((z,), [gathered], candidates, group):
            part = ops.block_lse(z[rows], columns, *options, diagonal, backend)
            exact[rows] = exact[rows].logaddexp(part.double().sum(0))
        if negatives is not None:
            part = ops.block_lse(z, negatives, *options, None, backend)
            exact = exact.logaddexp(part.double().sum(0))
        lse = split(exact, z.dtype).T.contiguous()  # [2N, 2]
        gathered += _gathered(lse, candidates, group) if gather == "all" else []
        ctx.save_for_backward(z, negatives, scale, lse, *gathered)
        ctx.options = (scale_value, candidates, group, same_gradient, backend)
        return (exact - _positive_scores(z) * _factor(scale, scale_value, z)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        z, negatives, scale, lse, *gathered = saved_tensors(ctx)
        scale_value, candidates, group, same_gradient, backend = ctx.options
        options, grad = (scale, scale_value, candidates), grad.contiguous()
        partners = reference.partners
        pull = -(grad + partners(grad)) * _factor(scale, scale_value, z)
        dz, dscale = pull[:, None] * partners(z), -(grad * _positive_scores(z)).sum()
        all_z, all_lse = gathered[: len(gathered) // 2], gathered[len(gathered) // 2 :]
        if same_gradient:
            all_grad = [grad[:1].expand(len(each)) for each in all_lse]
        else:
            all_grad = _gathered(grad, candidates, group) if gathered else []
        for rows, diagonal, (columns, column_lse, column_grad) in _meetings(
            (z, lse, grad), [all_z, all_lse, all_grad], candidates, group
        ):
            own = z[rows], lse[rows].T, grad[rows]
            others = columns, column_lse.T, column_grad
            part, dscale_part = ops.block_gradient(*own, *others, *options, diagonal, backend)
            dz[rows] += part
            dscale = dscale + dscale_part
        if negatives is not None:
            part, dscale_part = ops.block_gradient(
                z, lse.T, grad, negatives, None, None, *options, None, backend
            )
            dz, dscale = dz + part, dscale + dscale_part
        if scale is not None:
            dscale = dscale.to(scale.dtype)
        return dz, None, dscale if ctx.needs_input_grad[2] else None, *[None] * 6


anchor_losses = torch.compiler.disable(_AnchorLosses.apply)


def _factor(scale: Tensor | None, value: float, z: Tensor) -> Tensor | float:
    return value if scale is None else scale.to(z.dtype)


def _positive_scores(z: Tensor) -> Tensor:
    """z_i·z_π(i), [2N]; the scale is left to the caller."""
    return (z * reference.partners(z)).sum(1)


def _parts(count: int, candidates: str) -> list[tuple[slice, slice]]:
    """Which rows meet which of a process's columns."""
    if candidates != reference.OTHER_HALF:
        return [(slice(0, count), slice(0, count))]
    first, second = slice(0, count // 2), slice(count // 2, count)
    return [(first, second), (second, first)]


def _gathered(tensor: Tensor, candidates: str, group: dist.ProcessGroup) -> list[Tensor]:
    """For each of the parts, every process's columns."""
    return [all_gather(tensor[columns], group) for _, columns in _parts(len(tensor), candidates)]


def _meetings(
    tensors: tuple[Tensor, ...],
    gathered: list[list[Tensor]],
    candidates: str,
    group: dist.ProcessGroup,
) -> Iterator[_Meeting]:
    """What the rows meet: all processes' columns at once where they are gathered, else in turn."""
    count = len(tensors[0])
    parts = _parts(count, candidates)
    own_batch = candidates != reference.OTHER_HALF
    if gathered[0]:
        diagonal = dist.get_rank(group) * count if own_batch else None
        for index, (rows, _) in enumerate(parts):
            yield rows, diagonal, tuple(each[index] for each in gathered)
        return
    for step, received in enumerate(_ring(tensors, group)):
        diagonal = 0 if step == 0 and own_batch else None
        for rows, columns in parts:
            yield rows, diagonal, tuple(tensor[columns] for tensor in received)


def _ring(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of this process, then of the one before it in the ring, and so on.

    Each comes straight from its process into the same memory, which the next one overwrites.
    """
    yield tensors
    ranks = dist.get_process_group_ranks(group)
    rank, size = dist.get_rank(group), len(ranks)
    received = tuple(torch.empty_like(tensor) for tensor in tensors)
    for step in range(1, size):
        to, source = ranks[(rank + step) % size], ranks[(rank - step) % size]
        transfers = [dist.P2POp(dist.isend, tensor, to, group) for tensor in tensors]
        transfers += [dist.P2POp(dist.irecv, tensor, source, group) for tensor in received]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        yield received


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts)


class Call(NamedTuple):
    """What the processes of a loss must have in common."""

    images: int
    features: int
    dtype: str
    candidates: str = reference.OTHERS
    gather: str = "all"
    scale: float = 0.0  # of the similarities; 0 for a tensor's, which is not read

    def numbers(self) -> list[float]:
        """Words by their places among those that there are."""
        return [
            float(WORDS[name].index(value) if name in WORDS else value)
            for name, value in self._asdict().items()
        ]


WORDS = {
    "dtype": ("torch.float32", "torch.float64"),
    "candidates": (reference.OTHERS, reference.NEGATIVES, reference.OTHER_HALF),
    "gather": ("all", "ring"),
}

# Of each group, the calls that every process was seen to make.
_same_calls: WeakKeyDictionary[dist.ProcessGroup, set[Call]] = WeakKeyDictionary()


def check_same_call(names: str, call: Call, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ValueError, on every process, unless all make the same call.

    The numbers are always exchanged, so that the processes' collectives match, but a device is
    waited for only when a call is new here; a process whose own is not will then fail in the
    gathering that follows, when the other one has gone or the group's timeout is over.
    """
    gathered = all_gather(_row(call, device), group)  # [ranks, numbers]
    known, key = _same_calls.setdefault(group, set()), call._replace(scale=0.0)
    if key in known and device.type != "cpu":
        return
    rows = gathered.tolist()
    texts = []
    if any(row[:2] != rows[0][:2] for row in rows):
        texts.append(_differing("shape [N, D]", [f"[{n:.0f}, {d:.0f}]" for n, d, *_ in rows]))
    for place, name in enumerate(Call._fields[2:], 2):
        values = [row[place] for row in rows]
        if any(value != values[0] for value in values):
            words = WORDS.get(name)
            texts.append(_differing(name, [words[int(v)] if words else f"{v:g}" for v in values]))
    if texts:
        raise ValueError(f"{names}: {'; '.join(texts)}")
    known.add(key)  # whatever the scale: a schedule would make every step a new call


@lru_cache(maxsize=64)
def _row(call: Call, device: torch.device) -> Tensor:
    """[1, numbers], kept, so that a call that comes again copies nothing to the device."""
    return torch.tensor([call.numbers()], dtype=torch.float64, device=device)


def _differing(name: str, values: list[str]) -> str:
    each = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
    return f"expected the same {name} on every rank, got: {each}"
