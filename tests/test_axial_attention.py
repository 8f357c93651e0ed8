"""Axial attention against PyTorch's scaled_dot_product_attention on rows copied out of the grid."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_as_accurate, backends_here
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gcrl_kernels import BackendUnavailableError, axial_attention, axial_attention_packed
from gcrl_kernels.axial_attention import ops

BACKENDS = backends_here("axial_attention")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The rows moved to where scaled_dot_product_attention wants them, its output moved back."""
    rows = [tensor.movedim(axis + 1, -2) for tensor in (q, k, v)]  # [B, *rest, heads, N, D]
    length = rows[0].shape[-2]
    allowed = torch.ones(length, length, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask.movedim(axis + 1, -1)[..., None, None, :]
    scores = torch.zeros(length, length, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
    if bias is not None:
        scores = scores + bias
    out = scaled_dot_product_attention(*rows, attn_mask=scores, scale=scale)
    alone = ~allowed.any(-1)  # queries with nothing to attend to
    return out.masked_fill(alone[..., None], 0).movedim(-2, axis + 1)


def images(*grid: int, batch: int = 2, heads: int = 3, features: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, *grid, heads, features) for _ in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid, axis", [((5,), 0), ((4, 7), 0), ((4, 7), 1), ((2, 3, 4), 1)])
def test_agrees_with_sdpa(backend, dtype, causal, grid, axis) -> None:
    inputs = images(*grid)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return axial_attention(q, k, v, axis, causal=causal, backend=backend)

    assert_as_accurate(ours, lambda *t: plain(*t, axis=axis, causal=causal), inputs, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    grid=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    features=st.integers(1, 9),
    causal=st.booleans(),
    biased=st.booleans(),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.3, -1.0]),
    data=st.data(),
)
@settings(max_examples=60)
def test_any_shape_bias_and_mask(
    backend, grid, batch, heads, features, causal, biased, masked, scale, data
) -> None:
    axis = data.draw(st.integers(0, len(grid) - 1))
    inputs = images(*grid, batch=batch, heads=heads, features=features)
    if biased:
        inputs.append(torch.randn(heads, grid[axis], grid[axis]))
    options = {"causal": causal, "scale": scale}
    options["mask"] = torch.rand(batch, *grid) > 0.4 if masked else None

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return axial_attention(q, k, v, axis - len(grid), bias=bias, backend=backend, **options)

    def apart(*tensors: Tensor) -> Tensor:
        return plain(*tensors, axis=axis, **options)

    assert_as_accurate(ours, apart, inputs, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [0, 1])
def test_packed_is_the_same(backend, axis) -> None:
    q, k, v = images(4, 6)
    bias = torch.randn(3, (4, 6)[axis], (4, 6)[axis])
    packed = torch.stack([q, k, v], 3)

    def ours(qkv: Tensor, bias: Tensor) -> Tensor:
        return axial_attention_packed(qkv, axis, bias=bias, causal=True, backend=backend)

    def unpacked(qkv: Tensor, bias: Tensor) -> Tensor:
        return plain(*qkv.unbind(3), bias, axis=axis, causal=True)

    assert_as_accurate(ours, unpacked, [packed, bias], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded", "broken last dimension"])
def test_any_strides(backend, layout) -> None:
    contiguous = images(4, 6)
    views = []
    for tensor in contiguous:
        if layout == "permuted":
            tensor = tensor.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
        elif layout == "sliced":
            tensor = tensor.repeat(1, 2, 1, 1, 2)[:, ::2, :, :, :8]
        elif layout == "expanded":
            tensor = tensor[:1, :, :1].expand(2, 4, 6, 3, 8)
        else:
            tensor = tensor.mT.contiguous().mT
        views.append(tensor)
    out = axial_attention(*views, 1, backend=backend)
    expected = axial_attention(*[view.contiguous() for view in views], 1, backend=backend)
    assert torch.equal(out, expected)
    assert out.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exp(backend) -> None:
    q, k, v = images(4, 6)
    mask = torch.rand(2, 4, 6) > 0.5
    mask[0, :, 1] = False  # a column without a key
    q.requires_grad_()
    out, lse = axial_attention(
        q, k, v, 0, causal=True, scale=0.7, mask=mask, return_lse=True, backend=backend
    )
    scores = torch.einsum("bihgd,bjhgd->bhgij", q, k) * 0.7
    scores = scores.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    scores = scores.masked_fill(~mask.permute(0, 2, 1)[:, :, None, None], -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1).permute(0, 3, 1, 2))
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    assert torch.isneginf(lse[0, :, 1]).all()
    assert not out[0, :, 1].any()
    out.sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat_and_follow_any_upstream_strides(backend) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in images(4, 6))
    out = axial_attention(q, k, v, 1, backend=backend)
    upstream = torch.randn(6, 4, 2, 3, 8).permute(2, 1, 0, 3, 4)
    first = torch.autograd.grad(out, [q, k, v], upstream, retain_graph=True)
    second = torch.autograd.grad(out, [q, k, v], upstream.contiguous(), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    ones = torch.autograd.grad(out, [q, k, v], torch.ones_like(out), retain_graph=True)
    summed = torch.autograd.grad(out.sum(), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(ones, summed, strict=True))


def test_gradcheck() -> None:
    q, k, v = (t.double().requires_grad_() for t in images(2, 3, batch=1, heads=2, features=3))
    bias = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[[True, False, True], [True, True, True]]])

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return axial_attention(q, k, v, 1, bias=bias, mask=mask, backend="reference")

    torch.autograd.gradcheck(function, (q, k, v, bias))
    qkv = torch.stack([q, k, v], -3).detach().requires_grad_()
    torch.autograd.gradcheck(lambda qkv: axial_attention_packed(qkv, 0, causal=True), qkv)


def test_a_second_derivative_raises() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in images(2, 3))
    (gradient,) = torch.autograd.grad(axial_attention(q, k, v, 0).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="axial_attention is once differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in images(2, 3))
    bias = torch.randn(3, 3, 3, requires_grad=True) if masked else None
    mask = torch.rand(2, 2, 3) > 0.3 if masked else None
    options = (bias, mask, 1, masked, 0.5)
    torch.library.opcheck(ops.forward, (q, k, v, *options, "reference"))
    qkv = torch.stack([q, k, v], -3).detach().requires_grad_()
    torch.library.opcheck(ops.packed_forward, (qkv, *options, "reference"))
    saved = (torch.randn(2, 2, 3, 3, 8), qkv, *ops.packed_forward(qkv, *options, "reference"))
    saved = tuple(tensor.detach() for tensor in saved)
    options = (None if bias is None else bias.detach(), *options[1:], masked)
    torch.library.opcheck(ops.packed_backward, (*saved, *options, "reference"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(qkv: Tensor) -> Tensor:
        return axial_attention_packed(qkv * 2, 0, causal=True) * 3

    for height in (4, 5):
        qkv = torch.randn(2, height, 3, 3, 2, 8, requires_grad=True)
        out = compiled(qkv)
        expected = axial_attention_packed(qkv * 2, 0, causal=True) * 3
        torch.testing.assert_close(out, expected)
        gradients = [torch.autograd.grad(o.sin().sum(), qkv)[0] for o in (out, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_every_option(dynamic) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, scale: float):
        out, lse = axial_attention(
            q * 2, k, v, 1, scale=scale, bias=bias, mask=mask, return_lse=True
        )
        return out * 3, lse

    for width in (10, 11):
        inputs = [*images(3, width), torch.randn(3, width, width)]
        inputs = [tensor.double().requires_grad_() for tensor in inputs]
        q, k, v, bias = inputs
        mask = torch.rand(2, 3, width) > 0.3
        with torch._dynamo.config.patch(recompile_limit=1 if dynamic else 2):
            out, lse = compiled(*inputs, mask, 0.3)
        expected = 3 * plain(q * 2, k, v, bias, axis=1, scale=0.3, mask=mask)
        torch.testing.assert_close(out, expected)
        options = {"scale": 0.3, "bias": bias, "mask": mask, "return_lse": True}
        torch.testing.assert_close(lse, axial_attention(q * 2, k, v, 1, **options)[1])
        gradients = [torch.autograd.grad(o.sin().sum(), inputs) for o in (out, expected)]
        torch.testing.assert_close(*gradients)


def test_compiled_errors_say_the_same() -> None:
    q, k, v = images(2, 3)
    compiled = torch.compile(lambda q, k, v: axial_attention(q, k, v, 0), fullgraph=True)
    with pytest.raises(Exception, match=r"v: expected the dtype of q \(torch.float32\)"):
        compiled(q, k, v.half())


def test_autocast_casts_the_tensors_and_not_the_mathematics() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in images(4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        out = axial_attention(q, k, v, 1)
        (gradient,) = torch.autograd.grad(out.float().sum(), q, retain_graph=True)
    assert out.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in (q, k, v)]
    expected = axial_attention(*halves, 1)
    assert torch.equal(out, expected)
    (expected_gradient,) = torch.autograd.grad(expected.float().sum(), halves[0])
    assert torch.equal(gradient, expected_gradient.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert axial_attention(q.double(), k.double(), v.double(), 1).dtype == torch.float64


def test_autocast_casts_the_packed_tensor() -> None:
    qkv = torch.stack(images(4, 6), 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = axial_attention_packed(qkv, 0)
        (gradient,) = torch.autograd.grad(out.float().sum(), qkv, retain_graph=True)
    assert out.dtype == torch.bfloat16
    half = qkv.detach().bfloat16().requires_grad_()
    expected = axial_attention_packed(half, 0)
    assert torch.equal(out, expected)
    (expected_gradient,) = torch.autograd.grad(expected.float().sum(), half)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, expected_gradient.float())


def test_an_empty_batch() -> None:
    q = torch.empty(0, 4, 6, 3, 8, requires_grad=True)
    out = axial_attention(q, q, q, 1)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 6, 3, 8)


Q = torch.zeros(2, 4, 6, 3, 8)
BAD = [
    ({"q": "x"}, TypeError, "q: expected a tensor, got str"),
    ({"q": Q.long()}, TypeError, "q: expected a floating-point tensor .*got torch.int64"),
    ({"q": Q[0, 0]}, ValueError, r"q: expected \[B, \*grid, heads, D\].* got \[6, 3, 8\]"),
    ({"q": Q[..., :0], "k": Q[..., :0], "v": Q[..., :0]}, ValueError, "q: expected at least one"),
    (
        {"k": Q[:1]},
        ValueError,
        r"k: expected shape of q = \[2, 4, 6, 3, 8\], got \[1, 4, 6, 3, 8\]",
    ),
    (
        {"v": Q.half()},
        TypeError,
        r"v: expected the dtype of q \(torch.float32\), got torch.float16",
    ),
    ({"k": Q.to("meta")}, ValueError, r"k: expected the device of q \(cpu\), got meta"),
    ({"axis": 2}, ValueError, "axis: expected -2 to 1 for this grid, got 2"),
    ({"axis": -3}, ValueError, "axis: expected -2 to 1 for this grid, got -3"),
    ({"axis": 1.0}, TypeError, "axis: expected an integer, got float"),
    ({"causal": 1}, TypeError, "causal: expected True or False, got int"),
    ({"return_lse": None}, TypeError, "return_lse: expected True or False, got NoneType"),
    ({"scale": "1"}, TypeError, "scale: expected a number, got str"),
    ({"scale": torch.nan}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": -torch.inf}, ValueError, "scale: expected a finite number, got -inf"),
    (
        {"bias": Q[0, 0]},
        ValueError,
        r"bias: expected shape \[heads, N, N\] = \[3, 6, 6\], got \[6, 3",
    ),
    ({"bias": torch.zeros(3, 6, 6).int()}, TypeError, "bias: expected a floating-point tensor"),
    ({"bias": torch.zeros(3, 6, 6, device="meta")}, ValueError, "bias: expected the device of q"),
    (
        {"mask": Q[..., 0, 0]},
        TypeError,
        "mask: expected a tensor of dtype torch.bool, got torch.fl",
    ),
    (
        {"mask": Q[:, 0, :, 0, 0] > 0},
        ValueError,
        r"mask: expected shape \[B, \*grid\] = \[2, 4, 6\]",
    ),
    ({"mask": (Q[..., 0, 0] > 0).to("meta")}, ValueError, "mask: expected the device of q"),
    ({"backend": "fast"}, ValueError, "backend: expected .*got 'fast'"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_arguments(change, error, message) -> None:
    arguments = {"q": Q, "k": Q, "v": Q, "axis": 1} | change
    with pytest.raises(error, match=message):
        axial_attention(**arguments)


def test_bad_packed_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"qkv: expected \[B, \*grid, 3, heads, D\].* got \[2, 4, 6"
    ):
        axial_attention_packed(Q, 0)
    with pytest.raises(TypeError, match="qkv: expected a floating-point tensor"):
        axial_attention_packed(torch.zeros(1, 2, 3, 1, 8).int(), 0)


def test_a_backend_that_cannot_serve_raises() -> None:
    with pytest.raises(BackendUnavailableError, match="backend 'cuda' cannot run axial_attention"):
        axial_attention(Q, Q, Q, 0, backend="cuda")
