"""dcl, supcon and info_nce against their formulas, and the whole family against other people's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_as_accurate, backends_here, values_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from gcrl_kernels import dcl, info_nce, nt_xent, supcon

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = backends_here("supcon")


def scores_of(rows: Tensor, columns: Tensor, scale: Tensor | float, unit: bool = True) -> Tensor:
    if unit:
        rows, columns = normalize(rows, dim=1), normalize(columns, dim=1)
    return rows @ columns.T * scale


def reduced(losses: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    if reduction == "none":
        return losses
    count = losses.numel() if counted is None else counted.sum()
    return losses.sum() if reduction == "sum" else losses.sum() / count


def plain_dcl(
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor | float = 0.5,
    *,
    unit: bool = True,
    reduction: str = "mean",
    negatives: Tensor | None = None,
) -> Tensor:
    z, count = torch.cat([z0, z1]), len(z0)
    columns = z if negatives is None else torch.cat([z, negatives.to(z.dtype)])
    scores = scores_of(z, columns, 1 / temperature, unit)
    image = torch.arange(len(columns))
    image[: 2 * count] %= count
    candidates = image != image[: 2 * count, None]
    lse = scores.masked_fill(~candidates, -torch.inf).logsumexp(1)
    positive = scores.gather(1, torch.arange(2 * count).roll(count)[:, None])[:, 0]
    return reduced(lse - positive, reduction)


def plain_supcon(
    z: Tensor,
    labels: Tensor,
    temperature: Tensor | float = 0.5,
    *,
    unit: bool = True,
    reduction: str = "mean",
    negatives: Tensor | None = None,
) -> Tensor:
    columns = z if negatives is None else torch.cat([z, negatives.to(z.dtype)])
    scores = scores_of(z, columns, 1 / temperature, unit)
    oneself = torch.eye(len(z), len(columns), dtype=torch.bool)
    log_p = scores - scores.masked_fill(oneself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & ~oneself[:, : len(z)]
    count = positive.sum(1)
    losses = -(log_p[:, : len(z)] * positive).sum(1) / count.clamp_min(1)
    return reduced(losses, reduction, count > 0)


def plain_info_nce(
    a: Tensor, b: Tensor, scale: Tensor | float, *, unit: bool = True, reduction: str = "mean"
) -> Tensor:
    """As open_clip's ClipLoss: the mean of both cross-entropies."""
    logits, target = scores_of(a, b, scale, unit), torch.arange(len(a))
    both = [cross_entropy(matrix, target, reduction="none") for matrix in (logits, logits.T)]
    return reduced(torch.cat(both), reduction)


def embeddings(count: int = 7, features: int = 5, tensors: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(count, features) for _ in range(tensors)]


LABELS = torch.tensor([3, -1, 3, 2**40, 3, -1, 0])  # the last and 2^40 alone of their kind


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "loss, further", [("dcl", 0), ("dcl", 4), ("supcon", 0), ("supcon", 4), ("info_nce", 0)]
)
def test_agrees_with_its_formula(loss, backend, dtype, unit, further, reduction) -> None:
    negatives = torch.randn(further, 5, dtype=dtype) if further else None

    def ours(*z: Tensor) -> Tensor:
        options = {"normalize": unit, "reduction": reduction, "backend": backend}
        if loss == "info_nce":
            return info_nce(*z, logit_scale=2.0, **options)
        options["negatives"] = None if negatives is None else negatives.to(z[0].dtype)
        return dcl(*z, **options) if loss == "dcl" else supcon(*z, LABELS, **options)

    def plain(*z: Tensor) -> Tensor:
        options = {"unit": unit, "reduction": reduction}
        if loss == "info_nce":
            return plain_info_nce(*z, 2.0, **options)
        options["negatives"] = negatives
        return plain_dcl(*z, **options) if loss == "dcl" else plain_supcon(*z, LABELS, **options)

    assert_as_accurate(ours, plain, embeddings(tensors=1 if loss == "supcon" else 2), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, -0.3])
def test_the_scale_has_a_gradient(backend, temperature) -> None:
    tau, scale, (z0, z1) = torch.tensor(temperature), torch.tensor(1 / temperature), embeddings()
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = [
        (
            lambda z0, z1, tau: dcl(z0, z1, temperature=tau, backend=backend),
            plain_dcl,
            [z0, z1, tau],
        ),
        (
            lambda z, tau: supcon(z, LABELS, temperature=tau, backend=backend),
            lambda z, tau: plain_supcon(z, LABELS, tau),
            [z0, tau],
        ),
        (
            lambda a, b, scale: info_nce(a, b, logit_scale=scale, backend=backend),
            plain_info_nce,
            [z0, z1, scale],
        ),
    ]  # fmt: skip
    for ours, plain, inputs in pairs:
        assert_as_accurate(ours, plain, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    count=st.integers(2, 70),
    features=st.integers(1, 20),
    kinds=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_any_shape(backend, count, features, kinds, seed) -> None:
    torch.manual_seed(seed)
    z0, z1 = torch.randn(count, features), torch.randn(count, features)
    labels = torch.randint(kinds, (count,))
    assert_as_accurate(lambda *z: dcl(*z, backend=backend), plain_dcl, [z0, z1], z0.dtype)
    assert_as_accurate(
        lambda *z: info_nce(*z, logit_scale=2.0, backend=backend),
        lambda *z: plain_info_nce(*z, 2.0), [z0, z1], z0.dtype,
    )  # fmt: skip
    assert_as_accurate(
        lambda z: supcon(z, labels, reduction="sum", backend=backend),
        lambda z: plain_supcon(z, labels, reduction="sum"), [z0], z0.dtype,
    )  # fmt: skip


def peers() -> Any:
    from benchmarks.peers import Unavailable, load
    from benchmarks.peers.contrastive import lightly_losses

    try:
        return lightly_losses(), load("pytorch_metric_learning.losses", "pytorch-metric-learning")
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_equals_other_peoples(backend, temperature) -> None:
    """lightly's NTXentLoss and DCLLoss, pytorch-metric-learning's SupConLoss."""
    lightly, metric_learning = peers()
    z0, z1 = (z.double() for z in embeddings(9, 6))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 5, 4])
    options = {"temperature": temperature, "backend": backend}
    pairs = [
        (lambda *z: nt_xent(*z, **options), lightly.NTXentLoss(temperature), [z0, z1]),
        (lambda *z: dcl(*z, **options), lightly.DCLLoss(temperature), [z0, z1]),
        (
            lambda z: supcon(z, labels, **options),
            lambda z: metric_learning.SupConLoss(temperature)(z, labels),
            [z0],
        ),
    ]
    dtype = torch.float64 if backend == "reference" else torch.float32
    for ours, theirs, inputs in pairs:
        for actual, expected in zip(
            values_and_gradients(ours, inputs, dtype),
            values_and_gradients(theirs, inputs, torch.float64),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-6)


def test_gradcheck() -> None:
    z0, z1 = (z.double().requires_grad_() for z in embeddings(4, 3))
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    further, labels = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 2])
    options = {"reduction": "none", "negatives": further}
    torch.autograd.gradcheck(lambda *t: dcl(*t[:2], temperature=t[2], **options), (z0, z1, tau))
    torch.autograd.gradcheck(
        lambda z, tau: supcon(z, labels, temperature=tau, **options), (z0, tau)
    )
    torch.autograd.gradcheck(
        lambda a, b, scale: info_nce(a, b, logit_scale=scale, reduction="none"), (z0, z1, tau)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_edges(backend) -> None:
    z0, z1 = (z.requires_grad_() for z in embeddings(1, 5))
    assert dcl(z0, z1, backend=backend) == -torch.inf  # nobody to tell the positive from
    alone = info_nce(z0, z1, logit_scale=3.0, backend=backend)
    assert float(alone) == pytest.approx(0, abs=1e-6)
    z = torch.cat([z0, z1])
    both = supcon(z, torch.tensor([4, 4]), backend=backend)
    assert float(both) == pytest.approx(0, abs=1e-6)
    alone = supcon(z, torch.tensor([4, 5]), reduction="none", backend=backend)
    assert torch.equal(alone, torch.zeros(2))
    assert torch.equal(torch.autograd.grad(alone.sum(), z0)[0], torch.zeros_like(z0))
    assert supcon(z, torch.tensor([4, 5]), backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_changes_nothing_and_has_a_zero_gradient(backend) -> None:
    a, b = embeddings()
    bias = torch.tensor([-10.0], requires_grad=True)
    loss = info_nce(a, b, logit_scale=5.0, bias=bias, backend=backend)
    assert loss == info_nce(a, b, logit_scale=5.0, bias=3.0, backend=backend)
    assert torch.autograd.grad(loss, bias)[0] == 0


def test_compiles_whole() -> None:
    labels = torch.randint(3, (7,))

    def family(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
        return (
            dcl(z0, z1, temperature=tau)
            + supcon(z0, labels, temperature=tau)
            + info_nce(z0, z1, logit_scale=tau.exp(), bias=tau)
        )

    inputs = [z.requires_grad_() for z in (*embeddings(), torch.tensor(0.3))]
    results = [f(*inputs) for f in (torch.compile(family, fullgraph=True), family)]
    torch.testing.assert_close(*results)
    for gradients in zip(*(torch.autograd.grad(r, inputs) for r in results), strict=True):
        torch.testing.assert_close(*gradients)


Z, ONES = torch.ones(6, 5), torch.ones(6, dtype=torch.long)
BAD = [
    (lambda: supcon(Z[0], ONES), ValueError, r"z: expected 2 dimensions \[n, D\], got \[5\]"),
    (lambda: supcon(Z[:0], ONES[:0]), ValueError, r"z: .*at least one embedding and one feature"),
    (lambda: supcon(Z, Z[:, 0]), TypeError, "labels: expected a tensor of integers"),
    (lambda: supcon(Z, ONES[:5]), ValueError, r"labels: expected shape \[n\] = \[6\], got \[5\]"),
    (lambda: supcon(Z, ONES, temperature=0.0), ValueError, "temperature: expected a number other"),
    (lambda: supcon(Z, ONES, negatives=Z.half()), TypeError, "negatives: expected the dtype of z "),
    (lambda: supcon(Z, ONES.to("meta")), ValueError, "labels: expected the device of z"),
    (lambda: dcl(Z, Z[:4]), ValueError, r"z1: expected shape of z0 = \[6, 5\]"),
    (lambda: dcl(Z, Z, reduction="max"), ValueError, "reduction: expected one of"),
    (lambda: info_nce(Z[0], Z, logit_scale=1.0), ValueError, "a: expected 2 dimensions"),
    (lambda: info_nce(Z, Z.half(), logit_scale=1.0), TypeError, "b: expected the dtype of a"),
    (lambda: info_nce(Z, Z, logit_scale=Z), ValueError, "logit_scale: expected a tensor of one"),
    (lambda: info_nce(Z, Z, logit_scale="1"), TypeError, "logit_scale: expected a number, got str"),
    (lambda: info_nce(Z, Z, logit_scale=1.0, bias=Z), ValueError, "bias: expected a tensor of one"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_arguments(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
