"""NT-Xent against cross-entropy on the whole matrix of similarities."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import assert_as_accurate, backends_here
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from gcrl_kernels import BackendUnavailableError, nt_xent
from gcrl_kernels.contrastive import ops
from gcrl_kernels.contrastive.reference import NEGATIVES, OTHER_HALF, OTHERS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = backends_here("nt_xent")


def plain(
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor | float = 0.5,
    *,
    unit: bool = True,
    reduction: str = "mean",
    negatives: Tensor | None = None,
) -> Tensor:
    """The similarities of 2N views with themselves and with the further negatives, as logits."""
    count = len(z0)
    z = torch.cat([z0, z1])
    columns = z if negatives is None else torch.cat([z, negatives.to(z.dtype)])
    if unit:
        z, columns = normalize(z, dim=1), normalize(columns, dim=1)
    scores = z @ columns.T / temperature
    scores = scores.masked_fill(torch.eye(2 * count, len(columns), dtype=torch.bool), -torch.inf)
    return cross_entropy(scores, torch.arange(2 * count).roll(count), reduction=reduction)


def views(count: int = 6, features: int = 5) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(count, features) for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("further", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_cross_entropy(backend, dtype, unit, further, reduction) -> None:
    negatives = torch.randn(further, 5, dtype=dtype) if further else None

    def ours(z0: Tensor, z1: Tensor) -> Tensor:
        return nt_xent(
            z0, z1, normalize=unit, reduction=reduction, negatives=None if negatives is None
            else negatives.to(z0.dtype), backend=backend,
        )  # fmt: skip

    def matrix(z0: Tensor, z1: Tensor) -> Tensor:
        return plain(z0, z1, unit=unit, reduction=reduction, negatives=negatives)

    assert_as_accurate(ours, matrix, views(), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, -0.3])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_temperature_has_a_gradient(backend, temperature, shape) -> None:
    tau = torch.full(shape, temperature)

    def ours(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
        return nt_xent(z0, z1, temperature=tau, backend=backend)

    assert_as_accurate(ours, plain, [*views(), tau], torch.float32)
    as_number = nt_xent(*views(), temperature=temperature, backend=backend)
    torch.testing.assert_close(as_number, ours(*views(), tau))


@pytest.mark.parametrize("backend", BACKENDS)
@given(count=st.integers(1, 9), features=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_any_shape(backend, count, features, seed) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(count, features) for _ in range(2)]

    def ours(z0: Tensor, z1: Tensor) -> Tensor:
        return nt_xent(z0, z1, backend=backend)

    assert_as_accurate(ours, plain, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend) -> None:
    """Two opposite images whose views agree: s is 1/τ with the partner, -1/τ with the others."""
    z = torch.tensor([[2.0, 0.0], [-3.0, 0.0]])
    expected = math.log1p(2 * math.exp(-2 / 0.25))
    loss = nt_xent(z, z, temperature=0.25, backend=backend)
    assert float(loss) == pytest.approx(expected, rel=1e-3)
    alone = nt_xent(z[:1], z[1:], backend=backend)  # one image: its partner is its only candidate
    assert float(alone) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_normalise_as_pytorch_does(backend) -> None:
    z0, z1 = views()
    z0[2], z1[3] = 0, 1e-14
    dtype = torch.float64 if backend == "reference" else torch.float32
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (z0, z1)]
    ours, matrix = nt_xent(*leaves, backend=backend), plain(*leaves)
    torch.testing.assert_close(ours, matrix)
    for actual, expected in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(matrix, leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows(backend, value) -> None:
    z0, z1 = views()
    z1[3, 1] = value
    assert nt_xent(z0, z1, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_a_second_backward(backend) -> None:
    torch.manual_seed(0)
    z = torch.randn(5, 12, requires_grad=True)
    z0, z1 = z.T[::2], z.T[1::2]
    loss = nt_xent(z0, z1, reduction="none", backend=backend)
    contiguous = nt_xent(z0.contiguous(), z1.contiguous(), reduction="none", backend=backend)
    assert torch.equal(loss, contiguous)
    upstream = torch.rand(24)[::2]
    first = torch.autograd.grad(loss, z, upstream, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, z, upstream)[0])


@pytest.mark.parametrize("further", [False, True])
def test_gradcheck(further) -> None:
    z0, z1 = (tensor.double().requires_grad_() for tensor in views(3, 4))
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    negatives = torch.randn(2, 4, dtype=torch.float64) if further else None

    def function(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
        return nt_xent(z0, z1, temperature=tau, negatives=negatives, reduction="none")

    torch.autograd.gradcheck(function, (z0, z1, tau))
    columns = torch.randn(2, 4, dtype=torch.float64)  # they get no gradient
    torch.autograd.gradcheck(
        lambda rows, tau: ops.block_lse(rows, columns, tau, 0.0, OTHERS, None, "reference")[0],
        (z0, tau),
    )


def test_a_second_derivative_raises() -> None:
    z0, z1 = (tensor.requires_grad_() for tensor in views())
    (gradient,) = torch.autograd.grad(nt_xent(z0, z1), z0, create_graph=True)
    with pytest.raises(RuntimeError, match="a contrastive loss is once differentiable"):
        gradient.square().sum().backward()


def test_opcheck() -> None:
    z0, z1 = (tensor.requires_grad_() for tensor in views())
    tau = torch.tensor(0.3, requires_grad=True)
    options = (None, None, None, None, 0.5, OTHERS, True, "reference")
    torch.library.opcheck(ops.contrast, (z0, z1, *options))
    further = (torch.randn(2, 5), None, None, tau, 0.0, OTHER_HALF, False, "reference")
    torch.library.opcheck(ops.contrast, (z0, z1, *further))
    classes = (None, torch.arange(6).int() % 3, torch.ones(6), tau, 0.0, OTHERS, True, "reference")
    torch.library.opcheck(ops.contrast, (z0, None, *classes))
    rows, lse, grad = torch.randn(4, 5), torch.rand(2, 4), torch.rand(4)
    torch.library.opcheck(ops.block_lse, (rows, rows, None, 0.5, NEGATIVES, 0, "reference"))
    torch.library.opcheck(ops.block_lse, (z0, rows, tau, 0.0, OTHERS, None, "reference"))
    block = (rows, lse, grad, rows, lse, grad, None, 0.5, OTHERS, None)
    torch.library.opcheck(ops.block_gradient, (*block, "reference"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
        return nt_xent(z0 * 2, z1, temperature=tau.exp(), normalize=False)

    for count in (4, 5):
        inputs = [*views(count), torch.tensor(-0.5)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        losses = compiled(*inputs), plain(inputs[0] * 2, inputs[1], inputs[2].exp(), unit=False)
        torch.testing.assert_close(*losses)
        for actual, expected in zip(
            *(torch.autograd.grad(loss, inputs) for loss in losses), strict=True
        ):
            torch.testing.assert_close(actual, expected)


def test_a_number_may_be_dynamic() -> None:
    compiled = torch.compile(
        lambda z0, z1, tau: nt_xent(z0, z1, temperature=tau),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for temperature in (0.3, 0.7):
        torch.testing.assert_close(compiled(*views(), temperature), plain(*views(), temperature))


def test_compiled_errors_say_the_same() -> None:
    compiled = torch.compile(lambda z0, z1: nt_xent(z0, z1), fullgraph=True)
    with pytest.raises(Exception, match=r"z1: expected shape of z0 = \[6, 5\], got \[6, 4\]"):
        compiled(torch.zeros(6, 5), torch.zeros(6, 4))


def test_autocast_casts_nothing() -> None:
    z0, z1 = (tensor.requires_grad_() for tensor in views())
    expected = nt_xent(z0, z1)
    expected_gradient = torch.autograd.grad(expected, z0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z0, z1)
        gradient = torch.autograd.grad(loss, z0)[0]
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)


Z = torch.ones(6, 5)
BAD = [
    ({"z0": None}, TypeError, "z0: expected a tensor, got NoneType"),
    ({"z0": Z.long()}, TypeError, "z0: expected a floating-point tensor"),
    ({"z0": Z[0]}, ValueError, r"z0: expected 2 dimensions \[N, D\], got \[5\]"),
    ({"z0": Z[:0], "z1": Z[:0]}, ValueError, r"z0: expected \[N, D\] with at least one image"),
    ({"z1": Z.long()}, TypeError, "z1: expected a floating-point tensor"),
    ({"z1": Z[:4]}, ValueError, r"z1: expected shape of z0 = \[6, 5\], got \[4, 5\]"),
    ({"z1": Z.half()}, TypeError, "z1: expected the dtype of z0"),
    ({"z1": Z.to("meta")}, ValueError, "z1: expected the device of z0"),
    ({"negatives": Z[0]}, ValueError, r"negatives: expected 2 dimensions \[M, D\], got \[5\]"),
    ({"negatives": Z[:, :4]}, ValueError, r"negatives: expected shape \[M, D\] = \[6, 5\]"),
    ({"negatives": Z.half()}, TypeError, "negatives: expected the dtype of z0"),
    ({"negatives": Z.long()}, TypeError, "negatives: expected a floating-point tensor"),
    ({"negatives": Z.to("meta")}, ValueError, "negatives: expected the device of z0"),
    ({"temperature": 0}, ValueError, "temperature: expected a number other than 0, got 0"),
    ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
    ({"temperature": torch.nan}, ValueError, "temperature: expected a finite number, got nan"),
    ({"temperature": torch.inf}, ValueError, "temperature: expected a finite number, got inf"),
    ({"temperature": 10**400}, ValueError, "temperature: expected a finite number, got 1000"),
    (
        {"temperature": Z},
        ValueError,
        r"temperature: expected a tensor of one element, got \[6, 5\]",
    ),
    ({"temperature": torch.tensor(1)}, TypeError, "temperature: expected a floating-point tensor"),
    (
        {"temperature": torch.ones((), device="meta")},
        ValueError,
        "temperature: expected the device",
    ),
    ({"normalize": 1}, TypeError, "normalize: expected True or False, got int"),
    ({"reduction": "max"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none'"),
    ({"gather": "tree"}, ValueError, "gather: expected one of 'all', 'ring', got 'tree'"),
    ({"group": 3}, TypeError, "group: expected None or a torch.distributed process group, got int"),
    ({"backend": "fast"}, ValueError, "backend: expected .*got 'fast'"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_arguments(change, error, message) -> None:
    with pytest.raises(error, match=message):
        nt_xent(**({"z0": Z, "z1": Z} | change))


def test_a_backend_that_cannot_serve_raises() -> None:
    with pytest.raises(BackendUnavailableError, match="backend 'cuda' cannot run nt_xent"):
        nt_xent(Z, Z, backend="cuda")
