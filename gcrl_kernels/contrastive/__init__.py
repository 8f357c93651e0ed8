"""Contrastive losses of embeddings: each view tells its own image from the rest of the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize as normalize_rows

from gcrl_kernels import checks
from gcrl_kernels.backends import choose
from gcrl_kernels.contrastive import ops, reference
from gcrl_kernels.operators import (
    accumulation_dtype,
    as_autocast,
    check_reverse_mode,
    is_transformed,
    promote,
)

__all__ = ["dcl", "info_nce", "nt_xent", "supcon"]


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    negatives: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    gather: str = "all",
    backend: str | None = None,
) -> Tensor:
    """NT-Xent over 2N views (SimCLR, Chen et al. 2020, arXiv 2002.05709), in nats.

    Each of the 2N views is an anchor, with the loss -log( exp(s_{i,π(i)}) / Σ_{k≠i} exp(s_ik) ),
    where s_ik = z_i·z_k / temperature and π(i) is the other view of the same image.

    Args:
        z0, z1: [N, D], floating point, one dtype: the two views; row i of both is image i.
        temperature: a finite number other than 0, or a tensor of one element, which may require a
            gradient. Similarities divided by it are float32: beyond 3.4e38 the loss is infinite or
            NaN.
        normalize: divide each embedding by its length (at least 1e-12, as
            torch.nn.functional.normalize).
        reduction: "mean" over the 2N anchors, "sum", or "none": [2N], those of z0 first.
        negatives: [M, D], further negatives of every anchor (a memory bank); they get no gradient.
        group: None compares within this process. With a process group every rank's views are
            compared with all; the loss is that of the own anchors, and the gradients are such that
            averaging the parameters' over the ranks (DDP, FSDP) gives those of the joint batch.
            Every rank needs the same N. The collectives run outside a compiled graph: torch.compile
            breaks it there, and with fullgraph=True raises.
        gather: with a group, "all" holds every rank's embeddings at once, "ring" those of two
            ranks.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the views' device.

    Returns:
        float32 (float64 for float64 inputs), a scalar or [2N].

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device than stated.
        BackendUnavailableError: a backend asked for by name cannot serve here.
    """
    z0, z1 = check_views(z0, z1)
    scale = inverse("temperature", temperature, "z0", z0)
    options = (scale, normalize, reduction, negatives, group, gather)
    return _of_views("nt_xent", z0, z1, reference.OTHERS, *options, backend)


def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    negatives: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    gather: str = "all",
    backend: str | None = None,
) -> Tensor:
    """The decoupled contrastive loss (Yeh et al. 2021, arXiv 2110.06848), in nats.

    NT-Xent without the positive among the candidates: -s_{i,π(i)} + log Σ_{k≠i,π(i)} exp(s_ik).
    Arguments, result and errors are those of `nt_xent`; where an anchor has no negatives, its loss
    is minus infinity.
    """
    z0, z1 = check_views(z0, z1)
    scale = inverse("temperature", temperature, "z0", z0)
    options = (scale, normalize, reduction, negatives, group, gather)
    return _of_views("dcl", z0, z1, reference.NEGATIVES, *options, backend)


def info_nce(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: float | Tensor,
    bias: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    gather: str = "all",
    backend: str | None = None,
) -> Tensor:
    """The loss of two towers (CLIP, Radford et al. 2021, arXiv 2103.00020), in nats.

    With the logits s_ik = logit_scale a_i·b_k + bias, the cross-entropy of each row of them and of
    each column, where row i belongs to column i.

    Args:
        a, b: [N, D], floating point, one dtype: the embeddings of both towers.
        logit_scale: multiplies the similarities: a finite number, or a tensor of one element, which
            may require a gradient (CLIP learns its logarithm).
        bias: added to every logit: a number or a tensor of one element. It changes nothing, and its
            gradient is zero; it is here for models that have one.
        reduction: "mean" over the 2N rows and columns, "sum", or "none": [2N], the rows first.
        normalize, group, gather, backend: as in `nt_xent`.

    Returns:
        float32 (float64 for float64 inputs), a scalar or [2N].

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device than stated.
        BackendUnavailableError: a backend asked for by name cannot serve here.
    """
    a, b = check_views(a, b, "a", "b")
    scale = _number_or_tensor("logit_scale", logit_scale, "a", a)
    options = (scale, normalize, reduction, None, group, gather)
    loss = _of_views("info_nce", a, b, reference.OTHER_HALF, *options, backend)
    if bias is None:
        return loss
    tensor, _ = _number_or_tensor("bias", bias, "a", a)
    return loss if tensor is None else loss + 0 * tensor.to(loss.dtype)


def supcon(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    negatives: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, L_out), in nats.

    Every other embedding of an anchor's label is its positive; its loss is the mean over them of
    -log( exp(s_ip) / Σ_{k≠i} exp(s_ik) ), or 0 where there is none.

    Args:
        z: [n, D], floating point.
        labels: [n], integers.
        reduction: "mean" over the anchors that have a positive (NaN where none has), "sum", or
            "none": [n].
        temperature, normalize, negatives, backend: as in `nt_xent`.

    Returns:
        float32 (float64 for float64 inputs), a scalar or [n].

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device than stated.
        BackendUnavailableError: a backend asked for by name cannot serve here.
    """
    _check_embeddings("z", z, "[n, D]", "embedding")
    checks.check_dtype("labels", labels, checks.INTEGERS, "a tensor of integers")
    checks.check_shape("labels", labels, z.shape[:1], "[n]")
    checks.check_same_device("labels", labels, "z", z)
    scale = inverse("temperature", temperature, "z", z)
    negatives = _check_options(z, "z", normalize, reduction, negatives)
    # A class is the place of its first member among the sorted labels.
    labels = labels.contiguous()
    ordered = labels.sort().values
    classes = torch.searchsorted(ordered, labels)
    positives = torch.searchsorted(ordered, labels, right=True) - classes - 1
    share = positives.clamp_min(1).to(accumulation_dtype(z.dtype)).reciprocal()
    share = share.masked_fill(positives == 0, 0.0)
    check_reverse_mode("supcon", z, scale[0])
    losses, _ = ops.differentiable(
        z, None, negatives, classes.int(), share, *scale, reference.OTHERS, normalize,
        _choose("supcon", backend, z),
    )  # fmt: skip
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (positives > 0).sum()


def check_views(z0: Tensor, z1: Tensor, name0: str = "z0", name1: str = "z1") -> tuple[Tensor, ...]:
    """Both; raises unless they are [N, D], floating point, of one dtype on one device.

    Where autocast is on they may differ in dtype, and come back in the wider one.
    """
    _check_embeddings(name0, z0, "[N, D]", "image")
    checks.check_floating(name1, z1)
    checks.check_shape(name1, z1, z0.shape, f"of {name0}")
    checks.check_same_device(name1, z1, name0, z0)
    z0, z1 = promote(z0, z1)
    checks.check_same_dtype(name1, z1, name0, z0)
    return z0, z1


def _check_embeddings(name: str, z: Tensor, layout: str, row: str) -> None:
    checks.check_floating(name, z)
    checks.check_dimensions(name, z, 2, layout)
    if 0 in z.shape:
        raise checks.value_error(
            name, f"{layout} with at least one {row} and one feature", checks.shape(z)
        )


def _check_options(
    z: Tensor, name: str, normalize: bool, reduction: str, negatives: Tensor | None
) -> Tensor | None:
    """Returns the negatives without their gradient."""
    checks.check_flag("normalize", normalize)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    if negatives is None:
        return None
    checks.check_floating("negatives", negatives)
    checks.check_dimensions("negatives", negatives, 2, "[M, D]")
    checks.check_shape("negatives", negatives, (negatives.shape[0], z.shape[1]), "[M, D]")
    checks.check_same_device("negatives", negatives, name, z)
    negatives = as_autocast(negatives, z)
    checks.check_same_dtype("negatives", negatives, name, z)
    return negatives.detach()


def _number_or_tensor(
    name: str, value: float | Tensor, other_name: str, other: Tensor
) -> tuple[Tensor | None, float]:
    """As the operators take it: a tensor with one element and no dimension, or a number."""
    if not isinstance(value, Tensor):
        return None, checks.number(name, value)
    checks.check_floating(name, value)
    if value.numel() != 1:
        raise checks.value_error(name, "a tensor of one element", checks.shape(value))
    checks.check_same_device(name, value, other_name, other)
    return value.reshape(()), 0.0


def inverse(
    name: str, temperature: float | Tensor, other_name: str, other: Tensor
) -> tuple[Tensor | None, float]:
    """The scale that a temperature stands for: a tensor, or None and a number."""
    tensor, value = _number_or_tensor(name, temperature, other_name, other)
    if tensor is not None:
        return tensor.to(accumulation_dtype(other.dtype)).reciprocal(), 0.0
    if not value != 0:
        raise checks.value_error(name, "a number other than 0", temperature)
    return None, 1 / value


def _choose(function: str, backend: str | None, z: Tensor) -> str:
    return choose(function, backend, z, lambda name: ops.cannot(name, z.dtype))


def _of_views(
    function: str,
    z0: Tensor,
    z1: Tensor,
    candidates: str,
    scale: tuple[Tensor | None, float],
    normalize: bool,
    reduction: str,
    negatives: Tensor | None,
    group: dist.ProcessGroup | None,
    gather: str,
    backend: str | None,
) -> Tensor:
    """The reduced loss of views whose positives are their partners."""
    name = "a" if function == "info_nce" else "z0"
    negatives = _check_options(z0, name, normalize, reduction, negatives)
    checks.check_choice("gather", gather, ("all", "ring"))
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise checks.type_error(
            "group", "None or a torch.distributed process group", type(group).__name__
        )
    backend = _choose(function, backend, z0)
    check_reverse_mode(function, z0, z1, scale[0])
    if group is None or dist.get_world_size(group) == 1:
        options: tuple[Any, ...] = (*scale, candidates, normalize, backend)
        losses, _ = ops.differentiable(z0, z1, negatives, None, None, *options)
    else:
        if is_transformed():
            raise NotImplementedError(f"{function} over a group takes no transform of torch.func")
        from gcrl_kernels.contrastive.distributed import anchor_losses

        def embeddings(views: Tensor) -> Tensor:
            views = views.to(accumulation_dtype(views.dtype))
            return normalize_rows(views, dim=1, eps=reference.EPSILON) if normalize else views

        z = embeddings(torch.cat([z0, z1]))
        columns = None if negatives is None else embeddings(negatives)
        options = (*scale, candidates, group, gather, reduction != "none", backend)
        losses = anchor_losses(z, columns, *options)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
