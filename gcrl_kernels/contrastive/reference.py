"""The contrastive losses in plain PyTorch, on any device: their meaning, and the fallback.

The views' embeddings z [n, D] (normalised where that is asked for) have similarities
s_ik = scale z_i·z_k. Anchor i tells its positives P_i from its candidates C_i:

    lse_i = log Σ_{k∈C_i} exp(s_ik)           loss_i = lse_i - 1/|P_i| Σ_{p∈P_i} s_ip

The losses differ in these two sets alone (π(i) is the other view of i's image, N = n/2 rows away):

    nt_xent    C_i = all but i            P_i = {π(i)}      Chen et al. 2020, arXiv 2002.05709
    dcl        C_i = all but i and π(i)   P_i = {π(i)}      Yeh et al. 2021, arXiv 2110.06848
    info_nce   C_i = the other half       P_i = {π(i)}      Radford et al. 2021, arXiv 2103.00020
    supcon     C_i = all but i            P_i = all of i's class but i
                                                            Khosla et al. 2020, arXiv 2004.11362

An anchor without positives has the loss 0. Backward, from the upstream gradients g_i of the losses:

    W_ik  = g_i [ [k∈C_i] exp(s_ik - lse_i) - [k∈P_i] / |P_i| ]  +  the same of k and i
    dz_i  = scale Σ_k W_ik z_k            dscale = 1/2 Σ_i z_i·Σ_k W_ik z_k
    dv_i  = (dz_i - z_i (z_i·dz_i)) / |v_i|                     where z = v / |v|

W is symmetric. Further negatives are columns that are nobody's anchors: they have no second part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcrl_kernels.operators import accumulation_dtype
from gcrl_kernels.softmax import exponentials, log_sum_exp, softmax

EPSILON = 1e-12  # the least norm that a vector is divided by, as in torch.nn.functional.normalize

# Which columns a row does not take for its candidates, of those where it meets its own batch.
OTHERS = "all but itself"
NEGATIVES = "all but itself and its partner"
OTHER_HALF = "the other half"


def forward(
    z0: Tensor,  # [N, D]
    z1: Tensor | None,  # [N, D]; without it z0 is all n rows
    negatives: Tensor | None,  # [M, D]
    classes: Tensor | None,  # int32 [n], whose equals are positives; without them the partner is
    share: Tensor | None,  # [n], with classes: 1/|P_i|, or 0 where there are no positives
    scale: Tensor | None,
    scale_value: float,
    candidates: str,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of each anchor [n], those of z0, then those of z1; and what backward may need.

    That is for kernels, [2, n]: each log-sum-exp and what its rounding lost.
    """
    z, _ = embeddings(_join(z0, z1), normalize)
    columns = _columns(z, negatives, normalize)
    scores = _scores(z, columns, scale, scale_value)
    positive = _positive_scores(scores[:, : len(z)], classes, share)
    numerators, maximum = exponentials(_fill(scores, candidates, 0, -torch.inf))
    total = numerators.sum(1)
    # From the maximum on, so that what all scores have in common is not in the sum.
    weight = 1 if share is None else share.ne(0)
    losses = total.log() - (positive - weight * maximum)
    losses = losses if share is None else losses.masked_fill(share == 0, 0.0)
    return losses, log_sum_exp(maximum, total)


def backward(
    grad: Tensor,  # [n]
    z0: Tensor,
    z1: Tensor | None,
    negatives: Tensor | None,
    classes: Tensor | None,
    share: Tensor | None,
    scale: Tensor | None,
    lse: Tensor,  # [2, n], which the softmax here does without
    scale_value: float,
    candidates: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z0 and z1 (empty without one), and of the scale, a scalar."""
    views = _join(z0, z1)
    z, norm = embeddings(views, normalize)
    factor = _factor(scale, scale_value, z.dtype)
    if share is not None:
        grad = grad.masked_fill(share == 0, 0.0)
    columns = _columns(z, negatives, normalize)
    similarities = z @ columns.T
    weight = softmax(_fill(similarities * factor, candidates, 0, -torch.inf))  # [n, n + M]
    weight = _fill(weight * grad[:, None], candidates, 0, 0.0)
    own = weight[:, : len(z)]
    _subtract_positives(own, grad, classes, share)
    dscale = (weight * similarities).sum()
    dz = (weight @ columns + own.T @ z) * factor
    if normalize:
        inside = norm < EPSILON  # such a vector was divided by the constant
        radial = torch.where(inside, 0.0, (z * dz).sum(1, keepdim=True))
        dz = (dz - z * radial) / norm.clamp_min(EPSILON)
    dz = dz.to(views.dtype)
    dscale = dscale if scale is None else dscale.to(scale.dtype)
    if z1 is None:
        return dz, dz.new_empty(0), dscale
    dz0, dz1 = dz.split(len(z0))
    return dz0.clone(), dz1.clone(), dscale


def block_lse(
    rows: Tensor,  # [n, D]
    columns: Tensor,  # [m, D]
    scale: Tensor | None,
    scale_value: float,
    candidates: str,
    diagonal: int | None,  # the column where the rows' own batch begins; None: it is not there
) -> Tensor:
    """log Σ_k exp(s_ik) over the columns that are candidates, and its residual: [2, n]."""
    scores = _scores(rows, columns, scale, scale_value)
    numerators, maximum = exponentials(_fill(scores, candidates, diagonal, -torch.inf))
    return log_sum_exp(maximum, numerators.sum(1))


def block_gradient(
    rows: Tensor,  # [n, D]
    row_lse: Tensor,  # [2, n], with the residuals
    row_grad: Tensor,  # [n]
    columns: Tensor,  # [m, D]
    column_lse: Tensor | None,  # [2, m]; None: the columns are nobody's anchors
    column_grad: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    candidates: str,
    diagonal: int | None,
) -> tuple[Tensor, Tensor]:
    """What the columns add, as candidates, to the rows' gradient [n, D], and to the scale's.

    Where the columns are anchors too, theirs is half of each pair's part in the scale's gradient.
    """
    scores = _scores(rows, columns, scale, scale_value)
    weight = row_grad[:, None] * ((scores - row_lse[0, :, None]) - row_lse[1, :, None]).exp()
    weight = _fill(weight, candidates, diagonal, 0.0)
    if column_lse is not None and column_grad is not None:
        pulled = column_grad * ((scores - column_lse[0]) - column_lse[1]).exp()
        weight = weight + _fill(pulled, candidates, diagonal, 0.0)
    pull = weight @ columns
    dscale = (rows * pull).sum() * (1 if column_lse is None else 0.5)
    return pull * _factor(scale, scale_value, rows.dtype), dscale


def embeddings(views: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The vectors that are compared [n, D], and the norms [n, 1] of what was given."""
    views = views.to(accumulation_dtype(views.dtype))
    norm = views.norm(dim=1, keepdim=True)
    return (views / norm.clamp_min(EPSILON) if normalize else views), norm


def partners(views: Tensor) -> Tensor:
    """Of each row the other view of its image."""
    return views.roll(len(views) // 2, 0)


def _join(z0: Tensor, z1: Tensor | None) -> Tensor:
    return z0 if z1 is None else torch.cat([z0, z1])


def _columns(z: Tensor, negatives: Tensor | None, normalize: bool) -> Tensor:
    return z if negatives is None else torch.cat([z, embeddings(negatives, normalize)[0]])


def _factor(scale: Tensor | None, value: float, dtype: torch.dtype) -> Tensor | float:
    return value if scale is None else scale.to(dtype)


def _scores(rows: Tensor, columns: Tensor, scale: Tensor | None, value: float) -> Tensor:
    return rows @ columns.T * _factor(scale, value, rows.dtype)  # [n, m]


def _fill(matrix: Tensor, candidates: str, diagonal: int | None, value: float) -> Tensor:
    """`value` where a column is none of a row's candidates, in place."""
    if diagonal is None:
        return matrix
    n = len(matrix)
    own = matrix[:, diagonal : diagonal + n]
    if candidates == OTHER_HALF:
        own[: n // 2, : n // 2].fill_(value)
        own[n // 2 :, n // 2 :].fill_(value)
        return matrix
    own.diagonal().fill_(value)
    if candidates == NEGATIVES:
        own.diagonal(n // 2).fill_(value)
        own.diagonal(-(n // 2)).fill_(value)
    return matrix


def _positive_scores(scores: Tensor, classes: Tensor | None, share: Tensor | None) -> Tensor:
    """The mean score of each row's positives, [n]."""
    if classes is None or share is None:
        half = len(scores) // 2
        return torch.cat([scores.diagonal(half), scores.diagonal(-half)])
    return scores.masked_fill(~_same_class(classes), 0.0).sum(1) * share


def _subtract_positives(
    weight: Tensor, grad: Tensor, classes: Tensor | None, share: Tensor | None
) -> None:
    if classes is None or share is None:
        half = len(grad) // 2
        weight.diagonal(half).sub_(grad[:half])
        weight.diagonal(-half).sub_(grad[half:])
    else:
        weight -= _same_class(classes) * (grad * share)[:, None]


def _same_class(classes: Tensor) -> Tensor:
    """Which columns are a row's positives."""
    return (classes[:, None] == classes).fill_diagonal_(False)
