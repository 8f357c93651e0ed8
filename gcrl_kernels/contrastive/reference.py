"""NT-Xent in plain PyTorch, on any device: the meaning of the kernel, and its fallback.

With the n = 2N views z (normalised), s_ik = z_i·z_k / τ and i's partner π(i)
(Chen et al. 2020, arXiv 2002.05709):

    lse_i = log Σ_{k≠i} exp(s_ik)           loss_i = lse_i - s_{i,π(i)}

and backward, from the upstream gradients g_i of the losses:

    W_ik = g_i exp(s_ik - lse_i) + g_k exp(s_ik - lse_k)        (W_ii = 0)
    dz_i = 1/τ [ Σ_k W_ik z_k - (g_i + g_π(i)) z_π(i) ]
    dv_i = (dz_i - z_i (z_i·dz_i)) / |v_i|                      where z = v / |v|

Everything is built of blocks, some rows against some columns, so that the columns may lie on other
processes.
Further negatives are columns that are no rows: they have no second term in W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcrl_kernels.operators import accumulation_dtype

EPSILON = 1e-12  # the least norm that a vector is divided by, as in torch.nn.functional.normalize


def block_lse(
    rows: Tensor,  # [n, D]
    columns: Tensor,  # [m, D]
    temperature: Tensor | None,
    temperature_value: float,
    diagonal: int | None,
) -> Tensor:
    """log Σ_k exp(s_ik) over the columns, [n]; row i leaves out column diagonal + i, itself."""
    scores = _scores(rows, columns, temperature, temperature_value)
    return _without_self(scores, diagonal, -torch.inf).logsumexp(1)


def block_gradient(
    rows: Tensor,  # [n, D]
    row_lse: Tensor,  # [n]
    row_grad: Tensor,  # [n]
    columns: Tensor,  # [m, D]
    column_lse: Tensor | None,  # [m]; None: the columns are nobody's anchors
    column_grad: Tensor | None,
    temperature: Tensor | None,
    temperature_value: float,
    diagonal: int | None,
) -> tuple[Tensor, Tensor]:
    """What the columns add to the rows' gradient, Σ_k W_ik z_k / τ [n, D], and to that of τ."""
    scores = _scores(rows, columns, temperature, temperature_value)
    weight = row_grad[:, None] * (scores - row_lse[:, None]).exp()
    weight = _without_self(weight, diagonal, 0.0)
    scale = _divisor(temperature, temperature_value, rows.dtype)
    dtemperature = -(weight * scores).sum() / scale
    if column_lse is not None and column_grad is not None:
        pulled = column_grad * (scores - column_lse).exp()
        weight = weight + _without_self(pulled, diagonal, 0.0)
    return weight @ columns / scale, dtemperature


def forward(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    negatives: Tensor | None,  # [M, D]
    temperature: Tensor | None,
    temperature_value: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and the log-sum-exp of each anchor, [2N]: those of z0, then those of z1."""
    z, _ = _embeddings(torch.cat([z0, z1]), normalize)
    lse = block_lse(z, z, temperature, temperature_value, 0)
    if negatives is not None:
        columns, _ = _embeddings(negatives, normalize)
        lse = lse.logaddexp(block_lse(z, columns, temperature, temperature_value, None))
    return lse - positive_scores(z) / _divisor(temperature, temperature_value, z.dtype), lse


def backward(
    grad: Tensor,  # [2N]
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None,
    temperature: Tensor | None,
    lse: Tensor,  # [2N]
    temperature_value: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z0 and z1 [N, D], and of the temperature, a scalar."""
    views = torch.cat([z0, z1])
    z, norm = _embeddings(views, normalize)
    tau = (temperature, temperature_value)
    dz, dtemperature = block_gradient(z, lse, grad, z, lse, grad, *tau, 0)
    if negatives is not None:
        columns, _ = _embeddings(negatives, normalize)
        further, further_dtemperature = block_gradient(
            z, lse, grad, columns, None, None, *tau, None
        )
        dz, dtemperature = dz + further, dtemperature + further_dtemperature
    dz_positive, dtemperature_positive = positive_gradient(z, grad, *tau)
    dz, dtemperature = dz + dz_positive, dtemperature + dtemperature_positive
    if normalize:
        inside = norm < EPSILON  # such a vector was divided by the constant
        radial = torch.where(inside, 0.0, (z * dz).sum(1, keepdim=True))
        dz = (dz - z * radial) / norm.clamp_min(EPSILON)
    dz0, dz1 = dz.to(views.dtype).split(len(z0))
    dtype = dtemperature.dtype if temperature is None else temperature.dtype
    return dz0.clone(), dz1.clone(), dtemperature.to(dtype)


def positive_scores(z: Tensor) -> Tensor:
    """z_i·z_π(i), [2N]; the temperature is left to the caller."""
    return (z * _partners(z)).sum(1)


def positive_gradient(
    z: Tensor,  # [2N, D]
    grad: Tensor,  # [2N]
    temperature: Tensor | None,
    temperature_value: float,
) -> tuple[Tensor, Tensor]:
    """What the positives, -s_{i,π(i)}, add to the gradient of z [2N, D] and to that of τ."""
    scale = _divisor(temperature, temperature_value, z.dtype)
    dz = -(grad + _partners(grad))[:, None] * _partners(z) / scale
    return dz, (grad * positive_scores(z)).sum() / (scale * scale)


def _partners(views: Tensor) -> Tensor:
    return views.roll(len(views) // 2, 0)


def _embeddings(views: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The vectors that are compared [n, D], and the norms [n, 1] of what was given."""
    views = views.to(accumulation_dtype(views.dtype))
    norm = views.norm(dim=1, keepdim=True)
    return (views / norm.clamp_min(EPSILON) if normalize else views), norm


def _divisor(temperature: Tensor | None, value: float, dtype: torch.dtype) -> Tensor | float:
    return value if temperature is None else temperature.to(dtype)


def _scores(rows: Tensor, columns: Tensor, temperature: Tensor | None, value: float) -> Tensor:
    return rows @ columns.T / _divisor(temperature, value, rows.dtype)  # [n, m]


def _without_self(matrix: Tensor, diagonal: int | None, value: float) -> Tensor:
    """`value` where a row meets itself as a column."""
    if diagonal is not None:
        matrix.diagonal(diagonal).fill_(value)
    return matrix
