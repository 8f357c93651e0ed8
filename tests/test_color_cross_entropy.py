"""The colour-quantised losses against torch.nn.functional.cross_entropy on tokens found apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comparison import assert_as_accurate, backends_here
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from gcrl_kernels import color_cross_entropy, linear_color_cross_entropy, quantize_colors
from gcrl_kernels.color_cross_entropy import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = backends_here("color_cross_entropy")
LINEAR_BACKENDS = backends_here("linear_color_cross_entropy")


def nearest(pixels: Tensor, palette: Tensor) -> Tensor:
    """By NumPy, in float64: exact for integers; its argmin returns the first of several minima."""
    difference = pixels.double().numpy()[..., None, :] - palette.double().numpy()
    return torch.as_tensor(np.square(difference).sum(-1).argmin(-1))


def plain(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    flat = logits.flatten(0, -2)
    loss = cross_entropy(flat, tokens.flatten(), reduction="none", label_smoothing=label_smoothing)
    loss = loss + z_loss * flat.logsumexp(-1).square()
    counted = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask.flatten()
    loss = loss.where(counted, 0)
    if reduction == "none":
        return loss.view(tokens.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def scene(*positions: int, colors: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [*positions, K], uint8 pixels and an integer palette."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (*positions, 3), dtype=torch.uint8)
    palette = torch.randint(0, 256, (colors, 3), dtype=torch.uint8)
    return torch.randn(*positions, colors) * 2, pixels, palette


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("label_smoothing, z_loss", [(0.0, 0.0), (0.1, 0.01)])
def test_agrees_with_cross_entropy(
    backend, dtype, reduction, masked, label_smoothing, z_loss
) -> None:
    logits, pixels, palette = scene(4, 5)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss}
    options["mask"] = torch.rand(4, 5) > 0.3 if masked else None
    tokens = nearest(pixels, palette)

    def ours(logits: Tensor) -> Tensor:
        return color_cross_entropy(logits, pixels, palette, backend=backend, **options)

    assert_as_accurate(ours, lambda logits: plain(logits, tokens, **options), [logits], dtype)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_agrees_with_cross_entropy(backend, dtype, reduction, masked, biased) -> None:
    _, pixels, palette = scene(4, 5)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
    options["mask"] = torch.rand(4, 5) > 0.3 if masked else None
    tokens = nearest(pixels, palette)
    inputs = [torch.randn(4, 5, 7), torch.randn(11, 7), torch.randn(11)][: 3 if biased else 2]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_color_cross_entropy(
            hidden, weight, pixels, palette, bias=bias, backend=backend, **options
        )

    def apart(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        return plain(logits, tokens, **options)

    assert_as_accurate(ours, apart, inputs, dtype)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@given(
    positions=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    colors=st.integers(2, 9),
    features=st.integers(1, 6),
    as_tokens=st.booleans(),
)
@settings(max_examples=40)
def test_any_shape(backend, positions, colors, features, as_tokens) -> None:
    logits, pixels, palette = scene(*positions, colors=colors)
    tokens = nearest(pixels, palette)
    targets = (tokens.to(torch.uint8),) if as_tokens else (pixels, palette)
    hidden, weight = torch.randn(*positions, features), torch.randn(colors, features)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_color_cross_entropy(hidden, weight, *targets, backend=backend)

    def apart(hidden: Tensor, weight: Tensor) -> Tensor:
        return plain((hidden @ weight.T).view(-1, colors), tokens.flatten())

    assert_as_accurate(ours, apart, [hidden, weight], torch.float32)
    loss = color_cross_entropy(logits, *targets, backend=backend)
    torch.testing.assert_close(loss, plain(logits.view(-1, colors), tokens.flatten()))


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_more_positions_than_a_chunk(backend) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(20_000, 3), torch.randn(5, 3)
    tokens = torch.randint(0, 5, (20_000,))

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_color_cross_entropy(hidden, weight, tokens, backend=backend)

    assert_as_accurate(ours, lambda h, w: plain(h @ w.T, tokens), [hidden, weight], torch.float32)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_small_gradients_survive_half_precision(backend) -> None:
    """Divided by a million in float16 they would be zero; a gradient scaler multiplies first."""
    positions, scale = 1_000_000, 65_536.0
    torch.manual_seed(0)
    hidden = torch.randn(positions, 1).half().requires_grad_()
    weight = torch.tensor([[1.0], [-1.0], [0.0]]).half().requires_grad_()
    tokens = torch.zeros(positions, dtype=torch.uint8)
    loss = linear_color_cross_entropy(hidden, weight, tokens, backend=backend)
    (loss * scale).backward()
    exact, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    (plain(exact @ exact_weight.T, tokens.long()) * scale).backward()
    for actual, expected in ((hidden.grad, exact.grad), (weight.grad, exact_weight.grad)):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_z_loss_is_returned(backend) -> None:
    logits, pixels, palette = scene(6)
    logits.requires_grad_()
    loss, z_term = color_cross_entropy(
        logits, pixels, palette, z_loss=0.1, return_z_loss=True, backend=backend
    )
    without = color_cross_entropy(logits, pixels, palette, backend=backend)
    torch.testing.assert_close(z_term, 0.1 * logits.detach().logsumexp(-1).square().mean())
    torch.testing.assert_close(loss, without + z_term)
    assert not z_term.requires_grad


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_what_the_mask_leaves_out_does_not_count(backend) -> None:
    hidden, weight = torch.randn(6, 3), torch.randn(4, 3)
    hidden[2], tokens = torch.nan, torch.tensor([0, 1, 99, 3, 0, 1])
    mask = torch.tensor([True, True, False, True, True, True])
    kept = [hidden[mask], weight]

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        whole = torch.full((6, 3), torch.nan, dtype=hidden.dtype)
        whole = whole.index_put((mask.nonzero()[:, 0],), hidden)
        return linear_color_cross_entropy(whole, weight, tokens, mask=mask, backend=backend)

    assert_as_accurate(ours, lambda h, w: plain(h @ w.T, tokens[mask]), kept, torch.float32)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_nothing_counted_is_nan_with_zero_gradients(backend) -> None:
    hidden = torch.randn(6, 3, requires_grad=True)
    weight, mask = torch.randn(4, 3), torch.zeros(6, dtype=torch.bool)
    tokens = torch.zeros(6, dtype=torch.long)
    for loss in (
        linear_color_cross_entropy(hidden, weight, tokens, mask=mask, backend=backend),
        color_cross_entropy(hidden @ weight.T, tokens, mask=mask, backend=backend),
    ):
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert not gradient.any()


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("wrong", ["token above", "token below", "NaN pixel", "NaN hidden"])
def test_a_wrong_value_shows_as_nan(backend, wrong) -> None:
    hidden, weight = torch.randn(6, 3), torch.randn(4, 3)
    pixels, palette = torch.rand(6, 3), torch.rand(4, 3)
    tokens = torch.tensor([0, 1, 2, 3, 0, 1])
    targets: tuple[Tensor, ...] = (tokens,)
    if wrong == "NaN pixel":
        pixels[2, 1], targets = torch.nan, (pixels, palette)
    elif wrong == "NaN hidden":
        hidden[2, 0] = torch.nan
    else:
        tokens[2] = 4 if wrong == "token above" else -1
    losses = linear_color_cross_entropy(hidden, weight, *targets, reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False, False, True, False, False, False]
    assert linear_color_cross_entropy(hidden, weight, *targets, backend=backend).isnan()
    losses = color_cross_entropy(hidden @ weight.T, *targets, reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_gives_the_same(backend, reduction) -> None:
    hidden, weight = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    tokens = torch.randint(0, 4, (6,))
    loss = linear_color_cross_entropy(hidden, weight, tokens, reduction=reduction, backend=backend)
    upstream = torch.rand(loss.shape)
    first = torch.autograd.grad(loss, [hidden, weight], upstream, retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight], upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_may_overwrite_the_logits(backend, reduction, dtype) -> None:
    leaf, pixels, palette = scene(4, 5)
    leaf = leaf.to(dtype).requires_grad_()
    options = {"reduction": reduction, "z_loss": 0.01, "backend": backend}
    results = []
    for inplace in (False, True):
        logits = leaf * 2  # nobody else's: whether they are overwritten does not show
        loss = color_cross_entropy(logits, pixels, palette, inplace_backward=inplace, **options)
        upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
        results.append((loss, *torch.autograd.grad(loss, leaf, upstream)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[0][1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_the_backward_overwrote_serve_no_second_one(backend) -> None:
    leaf, pixels, palette = scene(4, 5)
    logits = leaf.requires_grad_() * 2
    loss = color_cross_entropy(logits, pixels, palette, inplace_backward=True, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_the_last_backward_takes_the_memory_of_what_the_forward_made(backend) -> None:
    hidden, weight = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with Returned("gcrl_kernels.linear_color_cross_entropy.default") as watch:
        loss = linear_color_cross_entropy(hidden, weight, torch.arange(6) % 4, backend=backend)
    made = {tensor.data_ptr() for tensor in watch.results[0][-3:]}
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    last = torch.autograd.grad(loss, [hidden, weight])
    assert not made & {tensor.data_ptr() for tensor in first}
    assert {tensor.data_ptr() for tensor in last} <= made
    assert all(torch.equal(*pair) for pair in zip(first, last, strict=True))


def test_backward_makes_nothing_as_large_as_hidden() -> None:
    """Its gradient is there since the forward."""
    hidden, weight = torch.randn(60, 30, requires_grad=True), torch.randn(4, 30)
    loss = linear_color_cross_entropy(hidden, weight, torch.arange(60) % 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.autograd.grad(loss, hidden)
    allocated = [event.self_cpu_memory_usage for event in profiler.events()]
    assert max(allocated) < hidden.nbytes


class Returned(TorchDispatchMode):
    """What the operators return whose names begin with `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.results = name, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(self.name):
            self.results.append(result)
        return result


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", ["", "h", "w", "b", "hb"])
def test_only_gradients_that_somebody_needs_are_computed(backend, reduction, needed) -> None:
    tokens = torch.randint(0, 4, (6,))
    leaves = [torch.randn(shape) for shape in ((6, 3), (4, 3), (4,))]
    expected = [tensor.double().requires_grad_() for tensor in leaves]
    plain(expected[0] @ expected[1].T + expected[2], tokens, reduction=reduction).sum().backward()
    for tensor, name in zip(leaves, "hwb", strict=True):
        tensor.requires_grad_(name in needed)
    with Returned("gcrl_kernels.linear_color") as watch:
        loss = linear_color_cross_entropy(
            *leaves[:2], tokens, bias=leaves[2], reduction=reduction, backend=backend
        ).sum()
        if needed:
            loss.backward()
    wanted = [name in needed for name in "hwb"]
    made = [result for result in watch.results if isinstance(result, tuple)]
    computed = [[tensor.numel() > 0 for tensor in result[-3:]] for result in made]
    assert computed == (
        [[False] * 3, wanted]
        if reduction == "none" and needed
        else [wanted if reduction == "mean" else [False] * 3]
    )
    for leaf, exact in zip(leaves, expected, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, exact.grad.float())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 2), (4, 2), (4,))
    )
    tokens, mask = torch.tensor([1, 3, 0]), torch.tensor([True, False, True])
    options = {"mask": mask, "reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_color_cross_entropy(hidden, weight, tokens, bias=bias, **options)

    torch.autograd.gradcheck(linear, (hidden, weight, bias))
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda logits: color_cross_entropy(logits, tokens, **options), logits)


def test_a_second_derivative_raises() -> None:
    hidden, weight = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3)
    tokens = torch.randint(0, 4, (6,))
    for loss in (
        linear_color_cross_entropy(hidden, weight, tokens),
        linear_color_cross_entropy(hidden, weight, tokens, reduction="none").sum(),
        color_cross_entropy(hidden @ weight.T, tokens),
    ):
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="color_cross_entropy is once differentiable"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("reduction, needs_grad", [("mean", [True] * 3), ("none", [False] * 3)])
def test_opcheck(backend, reduction, needs_grad) -> None:
    logits, pixels, palette = scene(2, 3, colors=5)
    mask = torch.rand(2, 3) > 0.5
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    options = (mask, reduction, 0.1, 0.01)
    for bias, targets in (
        (None, (pixels, palette)),
        (torch.randn(5, requires_grad=True), (nearest(pixels, palette), None)),
    ):
        arguments = (hidden, weight, bias, *targets, *options, needs_grad, False, backend)
        torch.library.opcheck(ops.linear_color_cross_entropy, arguments)
        arguments = (logits.requires_grad_(), *targets, *options, False, backend)
        torch.library.opcheck(ops.color_cross_entropy, arguments)
    for dtype in (torch.uint8, torch.float32):
        arguments = (pixels.to(dtype), palette.to(dtype), backend)
        torch.library.opcheck(ops.quantize_colors, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(hidden: Tensor, weight: Tensor, pixels: Tensor, palette: Tensor, mask: Tensor):
        logits = (hidden * 2) @ weight.T
        return (
            linear_color_cross_entropy(hidden * 2, weight, pixels, palette, mask=mask),
            color_cross_entropy(logits, quantize_colors(pixels, palette), mask=mask),
            color_cross_entropy(logits, pixels, palette, mask=mask),
        )

    for positions in (6, 7):
        _, pixels, palette = scene(positions)
        hidden = torch.randn(positions, 4, requires_grad=True)
        weight, mask = torch.randn(11, 4), torch.rand(positions) > 0.4
        expected = plain((hidden * 2) @ weight.T, nearest(pixels, palette), mask=mask)
        linear, of_tokens, of_pixels = compiled(hidden, weight, pixels, palette, mask)
        for loss in (linear, of_tokens, of_pixels):
            torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(linear + 2 * of_tokens + 3 * of_pixels, hidden)
        torch.testing.assert_close(gradient, torch.autograd.grad(6 * expected, hidden)[0])


def test_compiled_errors_say_the_same() -> None:
    compiled = torch.compile(lambda h, w, t: linear_color_cross_entropy(h, w, t), fullgraph=True)
    with pytest.raises(Exception, match=r"weight: expected \[K, C = 3\], got \[4, 2\]"):
        compiled(torch.zeros(6, 3), torch.zeros(4, 2), torch.zeros(6, dtype=torch.long))


def test_autocast_casts_the_product_and_never_the_colours() -> None:
    hidden, weight, bias = (torch.randn(s, requires_grad=True) for s in ((6, 4), (11, 4), (11,)))
    # 255 and 254.6 are the same in bfloat16: these colours must stay apart.
    palette = torch.arange(11)[:, None] * 0.4 + torch.tensor([251.0, 0.0, 0.0])
    pixels = palette[[3, 9, 10, 8, 7, 0]]
    tokens, logits = torch.tensor([3, 9, 10, 8, 7, 0]), hidden @ weight.T + bias
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_color_cross_entropy(hidden, weight, pixels, palette, bias=bias)
        same = linear_color_cross_entropy(hidden, weight, tokens, bias=bias)
        of_logits = color_cross_entropy(logits, pixels, palette)
    assert loss.dtype == of_logits.dtype == torch.float32
    assert torch.equal(loss, same)
    halves = [tensor.detach().bfloat16() for tensor in (hidden, weight, bias)]
    expected = linear_color_cross_entropy(*halves[:2], tokens, bias=halves[2])
    assert torch.equal(loss, expected)
    assert not torch.equal(loss, linear_color_cross_entropy(hidden, weight, tokens, bias=bias))
    assert torch.equal(of_logits, color_cross_entropy(logits.bfloat16(), tokens))
    assert not torch.equal(of_logits, color_cross_entropy(logits, tokens))
    for each in (loss, of_logits):
        (gradient,) = torch.autograd.grad(each, weight)
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_no_positions(backend) -> None:
    hidden, weight = torch.randn(0, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    tokens = torch.zeros(0, dtype=torch.long)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "backend": backend}
        loss = linear_color_cross_entropy(hidden, weight, tokens, **options)
        of_logits = color_cross_entropy(hidden @ weight.T, tokens, **options)
        assert loss.shape == of_logits.shape
        assert loss.isnan().all() if reduction == "mean" else not loss.any()
        for each in (loss, of_logits):
            (gradient,) = torch.autograd.grad(each.sum(), weight)
            assert not gradient.any()


LOGITS, PIXELS, PALETTE = torch.zeros(4, 5), torch.zeros(4, 3), torch.zeros(5, 3)
BAD = [
    ({"logits": 1}, TypeError, "logits: expected a tensor, got int"),
    ({"logits": LOGITS.int()}, TypeError, "logits: expected a floating-point tensor"),
    ({"logits": torch.tensor(0.0)}, ValueError, r"logits: expected \[..., K\]"),
    ({"pixels": PIXELS.int()}, TypeError, "pixels: expected a uint8 or floating-point tensor"),
    (
        {"pixels": PIXELS[:3]},
        ValueError,
        r"pixels: expected shape of logits.* = \[4, 3\], got \[3, 3",
    ),
    ({"pixels": PIXELS[:, :2]}, ValueError, r"pixels: expected \[..., 3\]"),
    ({"pixels": PIXELS.to("meta")}, ValueError, "palette: expected the device of pixels"),
    ({"palette": None}, TypeError, "pixels: expected integer tokens where there is no palette"),
    ({"palette": PALETTE > 0}, TypeError, "palette: expected an integer or floating-point tensor"),
    (
        {"palette": PALETTE[:4]},
        ValueError,
        r"palette: expected \[K, 3\] with K = 5 colours, got \[4",
    ),
    ({"palette": PALETTE[:, :2]}, ValueError, r"palette: expected \[K, 3\]"),
    ({"mask": LOGITS[:, 0]}, TypeError, "mask: expected a tensor of dtype torch.bool"),
    ({"mask": LOGITS > 0}, ValueError, r"mask: expected shape .* = \[4\], got \[4, 5\]"),
    ({"mask": (LOGITS[:, 0] > 0).to("meta")}, ValueError, "mask: expected the device of logits"),
    (
        {"reduction": "avg"},
        ValueError,
        "reduction: expected one of 'mean', 'sum', 'none', got 'avg'",
    ),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected 0 to 1, got 1.5"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing: expected a number, got str"),
    ({"label_smoothing": torch.nan}, ValueError, "label_smoothing: expected a finite number, got"),
    ({"z_loss": -1}, ValueError, "z_loss: expected at least 0, got -1"),
    ({"z_loss": torch.inf}, ValueError, "z_loss: expected a finite number, got inf"),
    ({"z_loss": None}, TypeError, "z_loss: expected a number, got NoneType"),
    ({"return_z_loss": 1}, TypeError, "return_z_loss: expected True or False, got int"),
    ({"inplace_backward": 1}, TypeError, "inplace_backward: expected True or False, got int"),
    ({"backend": "fast"}, ValueError, "backend: expected .*got 'fast'"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_arguments(change, error, message) -> None:
    arguments = {"logits": LOGITS, "pixels": PIXELS, "palette": PALETTE} | change
    with pytest.raises(error, match=message):
        color_cross_entropy(**arguments)


HIDDEN, WEIGHT = torch.zeros(4, 2), torch.zeros(5, 2)
BAD_LINEAR = [
    ({"hidden": HIDDEN.int()}, TypeError, "hidden: expected a floating-point tensor"),
    ({"hidden": torch.tensor(0.0)}, ValueError, r"hidden: expected \[..., C\]"),
    ({"weight": WEIGHT.int()}, TypeError, "weight: expected a floating-point tensor"),
    ({"weight": WEIGHT[:, :1]}, ValueError, r"weight: expected \[K, C = 2\], got \[5, 1\]"),
    (
        {"weight": WEIGHT.half()},
        TypeError,
        r"weight: expected the dtype of hidden \(torch.float32\)",
    ),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight: expected the device of hidden"),
    ({"bias": WEIGHT}, ValueError, r"bias: expected shape \[K\] = \[5\], got \[5, 2\]"),
    ({"bias": WEIGHT[:, 0].half()}, TypeError, "bias: expected the dtype of hidden"),
    ({"bias": WEIGHT[:, 0].int()}, TypeError, "bias: expected a floating-point tensor"),
    ({"pixels": PIXELS[:3]}, ValueError, r"pixels: expected shape of hidden .* got \[3, 3\]"),
    ({"reduction": None}, ValueError, "reduction: expected one of"),
]


@pytest.mark.parametrize("change, error, message", BAD_LINEAR)
def test_bad_linear_arguments(change, error, message) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "pixels": PIXELS, "palette": PALETTE} | change
    with pytest.raises(error, match=message):
        linear_color_cross_entropy(**arguments)
