"""Kernels that write into given tensors, as a function to differentiate; tests for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from comparison import assert_as_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_axial_attention import images, plain
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Layout = Callable[[list[Tensor]], list[Tensor]]


def contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def packed(tensors: list[Tensor]) -> list[Tensor]:
    """Parts of one tensor [B, *grid, parts, heads, D]."""
    return list(torch.stack(tensors, -3).unbind(-3))


def sliced(tensors: list[Tensor]) -> list[Tensor]:
    """Some of the positions and features of larger tensors, at multiples of 16 bytes."""
    larger = [torch.nn.functional.pad(tensor, (8, 16, 1, 0, 0, 2)) for tensor in tensors]
    return [tensor[..., :-2, 1:, 8:-16] for tensor in larger]


def misaligned(tensors: list[Tensor]) -> list[Tensor]:
    """Features that begin at odd places, with odd strides between positions."""
    return [torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2] for tensor in tensors]


def turned(tensors: list[Tensor]) -> list[Tensor]:
    """The heads outside the grid and the grid the other way round, in memory."""
    features = tensors[0].dim() - 1
    order = (*reversed(range(features)), features)
    return [tensor.permute(order).contiguous().permute(order) for tensor in tensors]


LAYOUTS: dict[str, Layout] = {
    layout.__name__: layout for layout in (contiguous, packed, sliced, misaligned, turned)
}


def nothing_yet(tensors: list[Tensor], layout: Layout) -> list[Tensor]:
    """Tensors of that layout that hold NaN."""
    return layout([torch.full_like(tensor, torch.nan) for tensor in tensors])


class Attention:
    """Attention through operators `axial_attention` and `axial_attention_backward` of a library.

    Every tensor that the kernels read or write has the layout; what they write holds NaN at first.
    """

    def __init__(
        self,
        library: Any,
        device: str,
        layout: str = "contiguous",
        *,
        axis: int,
        causal: bool = False,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.library, self.device, self.layout = library, device, LAYOUTS[layout]
        self.axis, self.causal, self.scale = axis, causal, scale
        self.mask = None if mask is None else mask.to(device)
        self.lse: Tensor | None = None  # of the last call, and its residuals

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = _Attention.apply(self, q, k, v, bias)
        return out

    def options(self, q: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        bias = None if bias is None else bias.float().contiguous()
        return bias, self.mask, self.axis, self.causal, scale


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: Attention, *inputs: Tensor | None) -> Tensor:
        *tensors, bias = (None if t is None else t.to(attention.device) for t in inputs)
        q, k, v = attention.layout(tensors)
        out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
        lse = torch.full((2, *q.shape[:-1]), torch.nan, device=q.device)
        attention.library.axial_attention(q, k, v, *attention.options(q, bias), out, lse)
        ctx.attention = attention
        ctx.save_for_backward(q, k, v, out, lse, bias)
        attention.lse = lse.cpu()
        return out.cpu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *tensors, out, lse, bias = ctx.saved_tensors
        attention = ctx.attention
        (grad,) = attention.layout([grad.to(attention.device)])
        gradients = nothing_yet(tensors, attention.layout)
        dbias = None if bias is None else torch.full(bias.shape, torch.nan, device=grad.device)
        attention.library.axial_attention_backward(
            grad, *tensors, out, lse, *attention.options(grad, bias), *gradients, dbias
        )
        dbias = None if dbias is None else dbias.to(bias.dtype).cpu()
        return None, *(g.contiguous().cpu() for g in gradients), dbias


class Machine(NamedTuple):
    """Where the kernels run: their operators and the device of their tensors."""

    library: Any
    device: str


def exact_lse(
    q: Tensor, k: Tensor, bias: Tensor | None = None, *, axis, causal=False, scale=None, mask=None
) -> Tensor:
    """[B, *grid, heads] in the inputs' dtype."""
    q, k = (tensor.movedim(axis + 1, -2) for tensor in (q, k))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        keys = mask.movedim(axis + 1, -1)[..., None, None, :]
        scores = scores.masked_fill(~keys, -torch.inf)
    return scores.logsumexp(-1).movedim(-1, axis + 1)


def check(
    machine: Machine, inputs: list[Tensor], dtype: torch.dtype, layout: str, **options: Any
) -> None:
    """Output, gradients and lse are as accurate as PyTorch's; lse in float32 always."""
    ours = Attention(*machine, layout, **options)
    assert_as_accurate(ours, lambda *t: plain(*t, **options), inputs, dtype)
    q, k, _, *bias = (tensor.to(dtype) for tensor in inputs)
    expected = exact_lse(*(t.double() for t in (q, k, *bias)), **options)
    plainly = exact_lse(*(t.float() for t in (q, k, *bias)), **options)
    assert ours.lse is not None
    lse, residual = ours.lse
    assert torch.equal(lse == -torch.inf, expected == -torch.inf)
    known = expected.isfinite()
    assert not residual[~known].any()
    if not known.any():
        return
    assert torch.equal(lse + residual, lse)
    error = (ours.lse.double().sum(0) - expected)[known].abs()
    allowed = 2 * (plainly - expected)[known].abs().max()
    assert (error <= allowed + 2e-7 * expected[known].abs().max() + 1e-6).all()


class Kernels:
    """What the kernels of a GPU must do, whatever they are written in; `machine` is a fixture."""

    def test_the_longest_row(self, machine) -> None:
        check(
            machine, images(1024, batch=1, heads=1, features=16), torch.bfloat16, "packed", axis=0
        )

    @given(
        length=st.integers(1, 140),
        features=st.integers(2, 16),
        heads=st.integers(1, 4),
        lines=st.integers(1, 3),
        axis=st.integers(0, 1),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(sorted(LAYOUTS)),
        causal=st.booleans(),
        biased=st.booleans(),
        masked=st.booleans(),
        scale=st.sampled_from([None, 0.05, -0.1]),
    )
    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_row(
        self,
        machine,
        length,
        features,
        heads,
        lines,
        axis,
        dtype,
        layout,
        causal,
        biased,
        masked,
        scale,
    ) -> None:
        grid = (length, lines) if axis == 0 else (lines, length)
        inputs = images(*grid, batch=1, heads=heads, features=8 * features)
        if biased:
            inputs.append(torch.randn(heads, length, length))
        options: dict[str, Any] = {"axis": axis, "causal": causal, "scale": scale}
        if masked:
            options["mask"] = torch.rand(1, *grid) > 0.4
        check(machine, inputs, dtype, layout, **options)

    @pytest.mark.parametrize("length", [9, 40, 70, 140])
    def test_the_gradient_of_a_bias_is_the_sum_over_many_lines(self, machine, length) -> None:
        """More lines than those that add to it in turn."""
        batch = 3 if length < 64 else 1  # fewer work at once on longer lines
        inputs = images(length, 5, batch=batch, heads=2, features=16)
        inputs.append(torch.randn(2, length, length))
        check(machine, inputs, torch.float32, "contiguous", axis=0, causal=True)

    @pytest.mark.parametrize("length", [32, 100, 140])
    def test_repeats_bit_for_bit(self, machine, length) -> None:
        inputs = [t.bfloat16() for t in images(length, 3, batch=1, heads=2, features=24)]
        inputs.append(torch.randn(2, length, length))
        ours = Attention(*machine, axis=0, causal=True)
        results = []
        for _ in range(2):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            out = ours(*leaves)
            results.append(
                [out, ours.lse, *torch.autograd.grad(out.float().square().sum(), leaves)]
            )
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", [6, 40, 140])
    def test_scores_out_of_range_give_what_softmax_gives(self, machine, dtype, length) -> None:
        q, k, v = images(length, batch=1, heads=1, features=16)
        q[0, 2], q[0, 3] = torch.inf, torch.nan
        out = Attention(*machine, axis=0)(*(tensor.to(dtype) for tensor in (q, k, v)))
        expected = plain(*(tensor.to(dtype).float() for tensor in (q, k, v)), axis=0)
        assert torch.equal(out.isnan(), expected.isnan())
        known = ~expected.isnan()
        tolerance = 16 * torch.finfo(dtype).eps
        assert (
            (out.float() - expected)[known].abs() <= tolerance * expected[known].abs().max()
        ).all()

    @pytest.mark.parametrize("length", [6, 70, 140])
    def test_a_key_that_is_left_out_may_hold_nan(self, machine, length) -> None:
        q, k, v = images(length, batch=1, heads=1, features=16)
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[0, 3] = False
        expected = plain(q, k, v, axis=0, mask=mask)
        k[0, 3] = torch.nan
        out = Attention(*machine, axis=0, mask=mask)(q, k, v)
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize("apart", [(2**31, 64), (64, 2**29)], ids=["lines", "positions"])
    def test_offsets_beyond_32_bits(self, machine, apart) -> None:
        """Lines, or positions, so far apart, in memory of which little is touched."""
        batch, length, heads, features = 2, 6, 2, 32
        size = max(apart[0] * batch, apart[1] * length) + 4096
        try:
            if machine.device == "cpu":
                storage = torch.UntypedStorage._new_shared(2 * size)
                memory = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (size,))
            else:
                memory = torch.empty(size, dtype=torch.bfloat16, device=machine.device)
        except RuntimeError as error:
            pytest.skip(f"no memory for it: {error}")
        place = (batch, length, heads, features), (*apart, features, 1)
        if apart[0] < apart[1]:
            place = (1, length, heads, features), (0, apart[1], features, 1)

        def far(number: int, tensor: Tensor) -> Tensor:
            return memory.as_strided(*place, number * 512).copy_(tensor)

        near = [
            t.to(torch.bfloat16)
            for t in images(length, batch=place[0][0], heads=heads, features=features)
        ]
        near = [tensor.to(machine.device) for tensor in near]
        grad = torch.ones_like(near[0])
        options = (None, None, 0, False, features**-0.5)
        results = []
        for view in (lambda number, tensor: tensor, far):
            out = torch.empty_like(grad)
            lse = torch.empty(2, *grad.shape[:-1], device=machine.device)
            q, k, v = (view(number, tensor) for number, tensor in enumerate(near))
            machine.library.axial_attention(q, k, v, *options, out, lse)
            gradients = [view(n, torch.full_like(grad, torch.nan)) for n in (4, 5, 6)]
            machine.library.axial_attention_backward(
                view(3, grad), q, k, v, out, lse, *options, *gradients, None
            )
            results.append([out, lse, *(gradient.clone() for gradient in gradients)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("shape", [(2, 0, 3, 16), (0, 5, 3, 16), (2, 5, 0, 16)])
    def test_nothing_to_do(self, machine, shape) -> None:
        q = torch.empty(shape, device=machine.device)
        lse = torch.empty(2, *shape[:-1], device=machine.device)
        bias = torch.ones(shape[2], shape[1], shape[1], device=machine.device)
        dbias = torch.full_like(bias, torch.nan)
        options = (bias, None, 0, False, 1.0)
        machine.library.axial_attention(q, q, q, *options, q, lse)
        machine.library.axial_attention_backward(q, q, q, q, q, lse, *options, q, q, q, dbias)
        assert (dbias == 0).all()
