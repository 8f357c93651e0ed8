"""The contrastive loss of two views of each image."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize as normalize_rows

from gcrl_kernels import checks
from gcrl_kernels.backends import choose
from gcrl_kernels.contrastive import ops, reference
from gcrl_kernels.operators import accumulation_dtype

__all__ = ["nt_xent"]


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
            gradient.
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
    check_views(z0, z1)
    if negatives is not None:
        checks.check_floating("negatives", negatives)
        checks.check_dimensions("negatives", negatives, 2, "[M, D]")
        checks.check_shape("negatives", negatives, (negatives.shape[0], z0.shape[1]), "[M, D]")
        checks.check_same_dtype("negatives", negatives, "z0", z0)
        checks.check_same_device("negatives", negatives, "z0", z0)
        negatives = negatives.detach()
    checks.check_flag("normalize", normalize)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_choice("gather", gather, ("all", "ring"))
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise checks.type_error(
            "group", "None or a torch.distributed process group", type(group).__name__
        )
    tau = _temperature(temperature, z0)
    backend = choose("nt_xent", backend, z0)
    if group is None or dist.get_world_size(group) == 1:
        losses, _ = ops.nt_xent(z0, z1, negatives, *tau, normalize, backend)
    else:
        losses = _group_losses(z0, z1, negatives, tau, normalize, reduction, group, gather, backend)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def check_views(z0: Tensor, z1: Tensor, name0: str = "z0", name1: str = "z1") -> None:
    """Raise unless both are [N, D], floating point, of one dtype on one device."""
    checks.check_floating(name0, z0)
    checks.check_dimensions(name0, z0, 2, "[N, D]")
    if 0 in z0.shape:
        raise checks.value_error(
            name0, "[N, D] with at least one image and one feature", checks.shape(z0)
        )
    checks.check_floating(name1, z1)
    checks.check_shape(name1, z1, z0.shape, f"of {name0}")
    checks.check_same_dtype(name1, z1, name0, z0)
    checks.check_same_device(name1, z1, name0, z0)


def _temperature(temperature: float | Tensor, z0: Tensor) -> tuple[Tensor | None, float]:
    """As the operators take it: a tensor with one element and no dimension, or a number."""
    if not isinstance(temperature, Tensor):
        checks.check_number("temperature", temperature)
        if not temperature != 0:
            raise checks.value_error("temperature", "a number other than 0", temperature)
        return None, float(temperature)
    checks.check_floating("temperature", temperature)
    if temperature.numel() != 1:
        raise checks.value_error(
            "temperature", "a tensor of one element", checks.shape(temperature)
        )
    checks.check_same_device("temperature", temperature, "z0", z0)
    return temperature.reshape(()), 0.0


def _group_losses(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None,
    tau: tuple[Tensor | None, float],
    normalize: bool,
    reduction: str,
    group: dist.ProcessGroup,
    gather: str,
    backend: str,
) -> Tensor:
    from gcrl_kernels.contrastive.distributed import anchor_losses

    def embeddings(views: Tensor) -> Tensor:
        views = views.to(accumulation_dtype(views.dtype))
        return normalize_rows(views, dim=1, eps=reference.EPSILON) if normalize else views

    z = embeddings(torch.cat([z0, z1]))
    columns = None if negatives is None else embeddings(negatives)
    return anchor_losses(z, columns, *tau, group, gather, reduction != "none", backend)
