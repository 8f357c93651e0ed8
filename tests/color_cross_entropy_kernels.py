"""What is tested of the kernels of every backend: test_color_cross_entropy_<backend>.py runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from comparison import assert_as_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_color_cross_entropy import nearest, plain
from torch import Tensor
from torch.utils import deterministic

from gcrl_kernels.color_cross_entropy import launch, ops

FP32, FP16, BF16 = DTYPES = torch.float32, torch.float16, torch.bfloat16
Targets = tuple[Tensor, Tensor | None]  # pixels and palette, or tokens

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    # Part of a larger tensor, at odd places, or at multiples of 16 bytes.
    "misaligned": lambda t: torch.nn.functional.pad(t, (1, 2))[:, 1:-2],
    "sliced": lambda t: torch.nn.functional.pad(t, (8, 24, 1, 0))[1:, 8:-24],
    "transposed": lambda t: t.T.contiguous().T,
}


class Losses(NamedTuple):
    """A backend's operators, on tensors of a device."""

    backend: str
    device: str

    def here(self, tensor: Any) -> Any:
        return None if tensor is None else tensor.to(self.device)

    def quantize(self, pixels: Tensor, palette: Tensor) -> Tensor:
        return ops.quantize_colors(self.here(pixels), self.here(palette), self.backend).cpu()

    def of_logits(
        self, logits: Tensor, targets: Targets, layout: str = "contiguous", **options: Any
    ):
        """Loss, its z-loss part, log-sum-exp with its residual and tokens."""
        inplace = options.pop("inplace", False)
        logits = LAYOUTS[layout](self.here(logits))
        settled = self._settle(targets, **options)
        results = ops.color_cross_entropy(logits, *settled, inplace, self.backend)
        return tuple(results[index].cpu() for index in (0, 1, 3, 4))

    def of_linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        layout: str = "contiguous",
        **options: Any,
    ) -> Tensor:
        hidden, weight = (LAYOUTS[layout](self.here(tensor)) for tensor in (hidden, weight))
        inputs = hidden, weight, self.here(bias)
        settled = self._settle(targets, **options)
        needed = [settled[3] != "none" and t is not None and t.requires_grad for t in inputs]
        loss: Tensor = ops.linear_color_cross_entropy(
            *inputs, *settled, needed, True, self.backend
        )[0]
        return loss.cpu()

    def _settle(
        self,
        targets: Targets,
        mask: Tensor | None = None,
        reduction: str = "none",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> tuple[Any, ...]:
        tensors = (self.here(tensor) for tensor in (*targets, mask))
        return *tensors, reduction, label_smoothing, z_loss


def scene(positions: int, colors: int, kind: str) -> tuple[Targets, Tensor]:
    """Targets of a kind, and their tokens."""
    pixels = torch.randint(0, 256, (positions, 3), dtype=torch.uint8)
    palette = torch.randint(0, 256, (colors, 3))
    if kind.startswith("token"):
        tokens = torch.randint(0, colors, (positions,))
        return (tokens.to(torch.int16 if kind == "token16" else torch.int64), None), tokens
    if kind == "bytes":
        palette = (palette // 64 * 64).to(torch.uint8)  # many ties
    elif kind == "far":
        palette[0] = 5000  # beyond what float32 compares exactly
    elif kind != "integers":
        dtype = {"halves": FP16, "floats": FP32, "doubles": torch.float64}[kind]
        pixels, palette = pixels.to(dtype) / 255, palette.to(dtype) / 255
    return (pixels, palette), nearest(pixels, palette)


KINDS = ("tokens", "token16", "bytes", "integers", "far", "halves", "floats", "doubles")


def some_options(given_options: str, positions: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "mask" in given_options:
        options["mask"] = torch.rand(positions) > 0.3
    if "smooth" in given_options:
        options["label_smoothing"] = 0.1
    if "z" in given_options:
        options["z_loss"] = 0.01
    options["reduction"] = next((r for r in ("mean", "sum") if r in given_options), "none")
    return options


# Positions, colours, dtype, layout, targets and options. A program or a block takes more positions
# the fewer colours there are.
CASES = [
    (1, 2, FP32, "contiguous", "tokens", ""),
    (700, 2, BF16, "contiguous", "integers", "smooth mean"),
    (70, 5, FP16, "misaligned", "bytes", "mask z"),
    (33, 16, BF16, "contiguous", "floats", "smooth z sum"),
    (300, 16, FP32, "transposed", "token16", "mask mean"),
    (50, 37, FP32, "misaligned", "doubles", "smooth z mask"),
    (40, 64, FP16, "sliced", "halves", "z mean"),
    (30, 100, BF16, "contiguous", "integers", "mask smooth sum"),
    (24, 136, BF16, "sliced", "far", "z"),
    (20, 256, FP16, "transposed", "bytes", "smooth"),
    (9, 500, FP32, "contiguous", "integers", "mask"),
    (17, 512, BF16, "contiguous", "bytes", "mask smooth z mean"),
    (18, 512, FP32, "sliced", "floats", "z sum"),
    (5, 520, FP16, "contiguous", "tokens", "smooth z"),
    (5, 1000, FP32, "misaligned", "floats", "mask"),
    (6, 2048, BF16, "contiguous", "integers", "smooth"),
    (3, 2051, FP16, "contiguous", "far", "z"),
    (5, 4096, FP32, "contiguous", "doubles", "mask z"),
    (4, 4096, BF16, "sliced", "bytes", "mean"),
]
# And features; with a bias where the options say so.
LINEAR_CASES = [
    (1, 2, 1, FP32, "contiguous", "tokens", ""),
    (70, 5, 7, FP16, "misaligned", "bytes", "mask z bias"),
    (33, 16, 24, BF16, "contiguous", "floats", "smooth z sum bias"),
    (300, 16, 8, FP32, "transposed", "token16", "mask z mean"),
    (30, 100, 32, BF16, "contiguous", "integers", "mask smooth sum"),
    (17, 512, 64, BF16, "sliced", "bytes", "mask smooth z mean bias"),
    (5, 2048, 16, FP32, "contiguous", "doubles", "smooth z bias sum"),
    (4, 4096, 12, FP16, "contiguous", "far", "mean"),
]


class KernelTests:
    """A fixture `losses` gives the backend."""

    @pytest.fixture(autouse=True)
    def poisoned(self) -> Iterator[None]:
        """New tensors hold NaN, or the largest integer, until they are written."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(before)

    @pytest.mark.parametrize("positions, colors, dtype, layout, kind, given_options", CASES)
    def test_logits_as_accurate_as_pytorch(
        self, losses, positions, colors, dtype, layout, kind, given_options
    ) -> None:
        options = some_options(given_options, positions)
        self.check_logits(losses, positions, colors, dtype, layout, kind, **options)

    @pytest.mark.parametrize(
        "positions, colors, features, dtype, layout, kind, given_options", LINEAR_CASES
    )
    def test_linear_as_accurate_as_pytorch(
        self, losses, positions, colors, features, dtype, layout, kind, given_options
    ) -> None:
        options = some_options(given_options, positions)
        self.check_linear(
            losses, positions, colors, features, dtype, layout, kind, "bias" in given_options,
            **options,
        )  # fmt: skip

    @given(
        positions=st.integers(1, 40),
        colors=st.integers(2, 600),
        features=st.integers(1, 20),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(sorted(LAYOUTS)),
        kind=st.sampled_from(KINDS),
        masked=st.booleans(),
        biased=st.booleans(),
        label_smoothing=st.sampled_from([0.0, 0.2, 1.0]),
        z_loss=st.sampled_from([0.0, 0.1]),
        reduction=st.sampled_from(["none", "sum", "mean"]),
    )
    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_shape(
        self, losses, positions, colors, features, dtype, layout, kind, masked, biased, **options
    ) -> None:
        if masked:
            options["mask"] = torch.rand(positions) > 0.3
            options["mask"][0] = True
        self.check_logits(losses, positions, colors, dtype, layout, kind, **options)
        self.check_linear(
            losses, positions, colors, features, dtype, layout, kind, biased, **options
        )

    def check_logits(self, losses, positions, colors, dtype, layout, kind, **options: Any) -> None:
        """Loss and gradient; z-loss part, log-sum-exp and tokens, in float32 and integers."""
        targets, tokens = scene(positions, colors, kind)
        logits = torch.randn(positions, colors) * 3
        others = []

        def ours(logits: Tensor) -> Tensor:
            loss, *others[:] = losses.of_logits(logits, targets, layout, **options)
            return loss

        assert_as_accurate(ours, lambda z: plain(z, tokens, **options), [logits], dtype)
        z_term, lse, found = others
        assert torch.equal(found, tokens)
        counted = options.get("mask", torch.ones(positions, dtype=torch.bool))
        exact = logits.to(dtype).double().logsumexp(1)
        exact_lse = lse.double().sum(0)
        torch.testing.assert_close(exact_lse[counted], exact[counted], rtol=1e-6, atol=1e-6)
        assert torch.equal(lse.sum(0), lse[0])
        exact = options.get("z_loss", 0.0) * exact.square().where(counted, 0.0)
        if options["reduction"] != "none":
            exact = exact.sum() / (counted.sum() if options["reduction"] == "mean" else 1)
        torch.testing.assert_close(z_term.double(), exact, rtol=3e-6, atol=1e-6)

    def check_linear(
        self, losses, positions, colors, features, dtype, layout, kind, biased, **options: Any
    ) -> None:
        targets, tokens = scene(positions, colors, kind)
        inputs = [torch.randn(positions, features), torch.randn(colors, features)]
        if biased:
            inputs.append(torch.randn(colors))

        def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return losses.of_linear(hidden, weight, bias, targets, layout, **options)

        def apart(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            logits = hidden @ weight.T
            return plain(logits if bias is None else logits + bias, tokens, **options)

        assert_as_accurate(ours, apart, inputs, dtype)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_more_positions_than_a_chunk(self, losses, monkeypatch, reduction) -> None:
        monkeypatch.setattr(launch, "MOST_ROWS", 64)
        monkeypatch.setattr(launch, "MOST_POSITIONS", 128)
        options = {"mask": torch.rand(300) > 0.3, "reduction": reduction}
        self.check_linear(losses, 300, 24, 10, FP16, "contiguous", "bytes", True, **options)

    @pytest.mark.parametrize("colors", [6, 300, 1500])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_overwrites_the_logits(self, losses, colors, dtype) -> None:
        leaf = (torch.randn(9, colors) * 3).to(dtype).requires_grad_()
        targets, _ = scene(9, colors, "bytes")
        results = []
        for inplace in (False, True):
            loss = losses.of_logits(leaf * 2, targets, z_loss=0.01, inplace=inplace)[0]
            upstream = torch.linspace(0.5, 1.5, 9)
            results.append((loss, *torch.autograd.grad(loss, leaf, upstream)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    @pytest.mark.parametrize("colors", [6, 300, 1500])
    def test_repeats_bit_for_bit(self, losses, colors) -> None:
        """The emulator runs the threads in another order each time."""
        targets, _ = scene(12, colors, "integers")
        leaves = [torch.randn(shape).bfloat16() for shape in ((12, 8), (colors, 8), (colors,))]
        results = []
        for _ in range(2):
            inputs = [leaf.clone().requires_grad_() for leaf in leaves]
            loss = losses.of_linear(*inputs, targets, reduction="sum")
            logits = (inputs[0] @ inputs[1].T).detach().requires_grad_()
            of_logits = losses.of_logits(logits, targets, z_loss=0.1)
            (gradient,) = torch.autograd.grad(of_logits[0].sum(), logits)
            results.append([loss, *torch.autograd.grad(loss, inputs), *of_logits, gradient])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_offsets_beyond_32_bits(self, losses) -> None:
        """Rows and colours so far apart in memory, of which little is touched."""
        rows, colors, apart = 3, 9, (2**30 + 8, 2**28)
        size = (rows - 1) * apart[0] + (colors - 1) * apart[1] + 1
        try:
            if losses == ("triton", "cpu"):  # the interpreter's process reads and writes it, too
                storage = torch.UntypedStorage._new_shared(2 * size)
            else:
                storage = torch.UntypedStorage(2 * size, device=losses.device)
            memory = torch.empty(0, dtype=BF16, device=losses.device).set_(storage, 0, (size,))
        except RuntimeError as error:
            pytest.skip(f"no memory for it: {error}")
        logits = torch.randn(rows, colors).bfloat16()
        far = memory.as_strided((rows, colors), apart)
        tokens = losses.here(torch.randint(0, colors, (rows,)))
        implementation = ops.IMPLEMENTATIONS[losses.backend]
        results = []
        for place in (losses.here(logits), far.copy_(logits)):
            found = implementation.forward(place, tokens, None, None, 0.1, 0.1)
            grad = torch.ones(rows, device=losses.device)
            implementation.backward(grad, place, tokens, None, found[2], 0.1, 0.1, place)
            results.append([*found, place.clone()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("count, colors", [(1, 1), (129, 30), (530, 33), (70, 200)])
    def test_nearest_colours(self, losses, count, colors) -> None:
        pixels = torch.randint(0, 256, (count, 3), dtype=torch.uint8)
        palette = torch.randint(0, 4, (colors, 3)) * 80  # many ties
        expected = nearest(pixels, palette)
        far = torch.cat([palette, torch.tensor([[9000, 0, 0]])])
        for each in (palette, palette.to(torch.uint8), palette.float(), far, palette.double()):
            assert torch.equal(losses.quantize(pixels, each), expected), each.dtype
        assert torch.equal(losses.quantize(pixels.half()[:, None], palette)[:, 0], expected)

    def test_nearest_of_extreme_integers(self, losses) -> None:
        """Their squared distances reach 3 * 2^62."""
        pixels = torch.randint(0, 256, (50, 3), dtype=torch.uint8)
        least, most = -(2**31), 2**31 - 1
        palette = torch.tensor([[least, least, least], [most, most, most], [most, most, most - 1]])
        assert (losses.quantize(pixels, palette) == 2).all()
        logits = torch.randn(50, 3)
        assert (losses.of_logits(logits, (pixels, palette))[3] == 2).all()

    @pytest.mark.parametrize("dtype", [FP32, torch.float64])
    def test_colours_that_are_not_finite(self, losses, dtype) -> None:
        nan, inf = torch.nan, torch.inf
        palette = torch.tensor([[nan, 0, 0], [9, 9, 9], [0, inf, 0], [1, 1, 1]], dtype=dtype)
        pixels = torch.tensor([[0, 0, 0], [0, 0, nan], [inf, 0, 0], [8, 8, 8]], dtype=dtype)
        assert losses.quantize(pixels, palette).tolist() == [3, -1, -1, 1]
        loss, _, _, tokens = losses.of_logits(torch.randn(4, 4), (pixels, palette))
        assert tokens.tolist() == [3, -1, -1, 1]
        assert loss.isnan().tolist() == [False, True, True, False]

    @pytest.mark.parametrize("colors", [7, 600])
    def test_a_wrong_value_shows_as_nan(self, losses, colors) -> None:
        logits = torch.randn(6, colors)
        logits[1, 3], logits[4, 2] = torch.nan, torch.inf
        logits.requires_grad_()
        tokens = torch.tensor([0, 1, colors, -1, 2, 5])
        loss = losses.of_logits(logits, (tokens, None))[0]
        wrong = [False, True, True, True, True, False]
        assert loss.isnan().tolist() == wrong
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isnan().any(1).tolist() == wrong

    @pytest.mark.parametrize("colors", [7, 600])
    def test_what_the_mask_leaves_out_may_hold_anything(self, losses, colors) -> None:
        logits, tokens = torch.randn(6, colors), torch.tensor([0, 1, 9999, 3, 0, 1])
        mask = torch.arange(6) != 2
        options = {"z_loss": 0.1, "label_smoothing": 0.1}
        expected = plain(logits[mask], tokens[mask], reduction="none", **options)
        logits[2] = torch.nan
        logits.requires_grad_()
        loss, z_term, *_ = losses.of_logits(logits, (tokens, None), mask=mask, **options)
        torch.testing.assert_close(loss[mask], expected)
        assert loss[2] == z_term[2] == 0
        assert not torch.autograd.grad(loss.sum(), logits)[0][2].any()

    @pytest.mark.parametrize("reduction", ["none", "sum"])
    def test_hidden_rows_that_the_mask_leaves_out_may_be_nan(self, losses, reduction) -> None:
        hidden, weight = torch.randn(6, 3), torch.randn(7, 3)
        mask, tokens = torch.arange(6) != 2, torch.arange(6)
        kept = [hidden[mask].requires_grad_(), weight.clone().requires_grad_()]
        exact = plain(kept[0] @ kept[1].T, tokens[mask], reduction="sum")
        expected = torch.autograd.grad(exact, kept)
        hidden[2] = torch.nan
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        options = {"mask": mask, "reduction": reduction}
        loss = losses.of_linear(*leaves, None, (tokens, None), **options).sum()
        torch.testing.assert_close(loss, exact)
        dhidden, dweight = torch.autograd.grad(loss, leaves)
        torch.testing.assert_close(dhidden[mask], expected[0])
        assert not dhidden[2].any()
        torch.testing.assert_close(dweight, expected[1])

    @pytest.mark.parametrize("colors", [7, 600])
    def test_large_logits_keep_their_precision(self, losses, colors) -> None:
        tokens = torch.randint(0, colors, (5,))
        logits = torch.randn(5, colors) + 4096  # so rounded, 4096 is taken away exactly
        near, far = (losses.of_logits(z, (tokens, None))[0] for z in (logits - 4096, logits))
        torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6)

    def test_no_positions(self, losses) -> None:
        hidden, weight = torch.randn(0, 3).requires_grad_(), torch.randn(4, 3).requires_grad_()
        tokens = torch.zeros(0, dtype=torch.long)
        for reduction in ("none", "sum"):
            loss = losses.of_linear(hidden, weight, None, (tokens, None), reduction=reduction)
            assert not torch.autograd.grad(loss.sum(), weight)[0].any()
        logits = torch.randn(0, 4, requires_grad=True)
        loss = losses.of_logits(logits, (tokens, None))[0]
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 4)
        palette = torch.zeros(4, 3)
        assert losses.quantize(torch.zeros(0, 3), palette).shape == (0,)
