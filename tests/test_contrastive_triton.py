"""The contrastive losses in Triton: on a GPU where there is one, else interpreted; as compiled."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from comparison import assert_as_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_contrastive import plain
from test_contrastive_cpu import pair
from test_contrastive_family import plain_dcl, plain_info_nce, plain_supcon
from torch import Tensor
from triton_interpreter import interpreter

from gcrl_kernels import backends
from gcrl_kernels.contrastive import ops
from gcrl_kernels.contrastive.launch import CANDIDATES
from gcrl_kernels.contrastive.reference import NEGATIVES, OTHER_HALF, OTHERS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
KERNELS = "gcrl_kernels.contrastive.triton.launchers"
OPERATORS = ("contrast", "contrast_backward", "contrast_block_lse", "contrast_block_gradient")
FP32, FP16, BF16 = DTYPES = torch.float32, torch.float16, torch.bfloat16


class Losses(NamedTuple):
    """The four losses of the operators, "none" reduced, on tensors of a device."""

    device: str

    def here(self, tensor: Any) -> Any:
        return None if tensor is None else tensor.to(self.device)

    def views(self, z0, z1, scale, candidates, negatives=None, unit=True) -> Tensor:
        scale = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=FP32)
        further = None if negatives is None else self.here(negatives.to(z0.dtype))
        tensors = (*map(self.here, (z0, z1)), further, None, None, self.here(scale))
        losses, _ = ops.contrast(*tensors, 0.0, candidates, unit, "triton")
        return losses.cpu()

    def nt_xent(self, z0: Tensor, z1: Tensor, tau: Any = 0.5, **options: Any) -> Tensor:
        return self.views(z0, z1, 1 / tau, OTHERS, **options)

    def dcl(self, z0: Tensor, z1: Tensor, tau: Any = 0.5, **options: Any) -> Tensor:
        return self.views(z0, z1, 1 / tau, NEGATIVES, **options)

    def info_nce(self, a: Tensor, b: Tensor, scale: Any = 4.0, unit: bool = True) -> Tensor:
        return self.views(a, b, scale, OTHER_HALF, unit=unit)

    def supcon(self, z, labels, tau: Any = 0.5, negatives=None, unit=True) -> Tensor:
        """The scale is a number."""
        classes = labels.unique(return_inverse=True)[1]
        positives = classes.bincount()[classes] - 1
        share = torch.where(positives > 0, 1 / positives.clamp_min(1), 0.0)
        further = None if negatives is None else self.here(negatives.to(z.dtype))
        numbers = self.here(classes.int()), self.here(share)
        losses, _ = ops.contrast(
            self.here(z), None, further, *numbers, None, 1 / tau, OTHERS, unit, "triton"
        )
        return losses.cpu()


@pytest.fixture(scope="class")
def losses() -> Iterator[Losses]:
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        if backends.unavailable("triton") is None:
            yield Losses("cuda")
            return
        kernels = importlib.import_module(KERNELS)
        with interpreter() as call, pytest.MonkeyPatch.context() as patch:
            call("torch:use_deterministic_algorithms", True)
            for name in OPERATORS:
                patch.setattr(kernels, name, partial(call, f"{KERNELS}:{name}"))
            yield Losses("cpu")
    finally:
        torch.use_deterministic_algorithms(False)


# Below, at and beyond a tile of rows, of columns and of features; parts of a gradient.
CASES = [
    (1, 1, FP32),
    (2, 3, BF16),
    (20, 17, FP32),
    (33, 64, FP16),
    (66, 16, BF16),
    (20, 128, BF16),
    (10, 130, FP32),
    (9, 300, FP16),
    (5, 600, FP32),
    (2, 1500, BF16),
]


class TestKernels:
    """In the interpreter, or on a GPU."""

    @pytest.mark.parametrize("count, features, dtype", CASES)
    def test_the_four_losses(self, losses, count, features, dtype) -> None:
        inputs, labels = pair(count, features), torch.arange(count) % 7
        none: dict[str, Any] = {"reduction": "none"}
        assert_as_accurate(losses.nt_xent, partial(plain, **none), inputs, dtype)
        assert_as_accurate(
            losses.info_nce,
            lambda a, b: plain_info_nce(a, b, 4.0, **none),
            inputs,
            dtype,
        )
        if count == 1:  # nobody else
            return
        assert_as_accurate(losses.dcl, partial(plain_dcl, **none), inputs, dtype)
        assert_as_accurate(
            lambda z: losses.supcon(z, labels),
            lambda z: plain_supcon(z, labels, **none), inputs[:1], dtype,
        )  # fmt: skip

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("temperature, further", [(1.0, 70), (0.1, 0), (0.01, 3), (-0.05, 40)])
    def test_temperatures_and_negatives(self, losses, dtype, temperature, further) -> None:
        """The temperature's gradient too."""
        negatives = torch.randn(further, 24).to(dtype) if further else None
        options: dict[str, Any] = {"reduction": "none", "negatives": negatives}
        inputs = [*pair(40, 24), torch.tensor(temperature)]
        for ours, theirs in ((losses.nt_xent, plain), (losses.dcl, plain_dcl)):
            assert_as_accurate(
                partial(ours, negatives=negatives), partial(theirs, **options), inputs, dtype
            )

    @pytest.mark.parametrize("dtype", [FP32, FP16])
    def test_classes_with_further_negatives(self, losses, dtype) -> None:
        z, negatives = torch.randn(90, 20), torch.randn(30, 20).to(dtype)
        labels = torch.arange(90) % 44  # two have one positive alone; then some have none
        labels[:3] = torch.tensor([90, 91, 92])
        assert_as_accurate(
            lambda z: losses.supcon(z, labels, 0.1, negatives),
            lambda z: plain_supcon(z, labels, 0.1, reduction="none", negatives=negatives),
            [z], dtype,
        )  # fmt: skip

    @given(
        count=st.integers(1, 40),
        features=st.integers(1, 40),
        temperature=st.sampled_from([1.0, 0.2, 0.01, -0.1]),
        unit=st.booleans(),
        further=st.integers(0, 40),
        stride=st.integers(1, 3),
    )
    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_batch(self, losses, count, features, temperature, unit, further, stride) -> None:
        negatives = torch.randn(further, features) if further else None
        if not unit:  # their scores are large enough
            temperature = math.copysign(1.0, temperature)
        options: dict[str, Any] = {"negatives": negatives, "unit": unit}

        def laid_out(z: Tensor) -> Tensor:
            """With that stride over features, and rows farther apart."""
            wide = z.new_zeros(len(z), stride * features + 3)
            return wide[:, : stride * features : stride].copy_(z)

        assert_as_accurate(
            lambda *z: losses.nt_xent(*map(laid_out, z), temperature, **options),
            lambda *z: plain(*z, temperature, reduction="none", **options),
            pair(count, features), FP32,
        )  # fmt: skip

    def test_scores_that_lie_far_apart(self, losses) -> None:
        """Rows of very different lengths: one exponential no longer serves both sides."""
        z0, z1 = pair(70, 8)
        lengths = torch.linspace(0.1, 30, 70)[:, None]
        inputs, labels = [z0 * lengths, z1 * lengths.flip(0)], torch.arange(70) % 4
        options: dict[str, Any] = {"reduction": "none", "unit": False}
        for ours, theirs in ((losses.nt_xent, plain), (losses.dcl, plain_dcl)):
            assert_as_accurate(partial(ours, unit=False), partial(theirs, **options), inputs, FP32)
        assert_as_accurate(
            lambda z: losses.supcon(z, labels, unit=False),
            lambda z: plain_supcon(z, labels, **options), inputs[:1], FP32,
        )  # fmt: skip

    def test_large_scores(self, losses) -> None:
        """All scores are about 1,000."""
        inputs = [(math.sqrt(1000 / 16) + z / 16) / 32 for z in pair(70, 16)]
        assert_as_accurate(
            lambda *z: losses.nt_xent(*z, 2.0**-10, unit=False).sum(),
            lambda *z: plain(*z, 2.0**-10, unit=False, reduction="sum"), inputs, FP32,
        )  # fmt: skip

    def test_lse_keeps_what_its_rounding_loses(self, losses) -> None:
        """All scores are 1,000, exactly."""
        z = losses.here(torch.eye(1, 5).repeat(20, 1))
        options = (None, None, None, None, 1000.0, OTHERS, True, "triton")
        _, lse = ops.contrast(z, z, *options)
        expected = torch.full((40,), 1000 + math.log(39), dtype=torch.float64)
        torch.testing.assert_close(lse.cpu().double().sum(0), expected, rtol=0, atol=2e-6)

    def test_small_gradients_survive_in_float16(self, losses) -> None:
        """The weights of a mean over very many anchors are no float16 numbers."""
        z0, z1 = (z.half().requires_grad_() for z in pair(20, 16, scale=2.0**-8))
        large, small = (
            torch.autograd.grad(losses.nt_xent(z0, z1), z0, torch.full((40,), upstream))[0].float()
            for upstream in (1.0, 2.0**-16)
        )
        error = (small * 2.0**16 - large).abs().max()
        assert error <= 2e-3 * large.abs().max()

    @pytest.mark.parametrize("candidates", [OTHERS, NEGATIVES])
    @pytest.mark.parametrize("rows, columns, diagonal", [(34, 140, 50), (6, 9, None), (70, 70, 0)])
    def test_blocks(self, losses, candidates, rows, columns, diagonal) -> None:
        """Rows against columns, as processes have them."""
        z, others = torch.randn(rows, 20) / 4, torch.randn(columns, 20) / 4
        scale = torch.tensor(3.0)

        def both(operator: Any, *arguments: Any) -> list[Any]:
            here = [losses.here(a) if isinstance(a, Tensor) else a for a in arguments]
            return [operator(*here, "triton"), operator(*arguments, "reference")]

        lse, expected_lse = both(ops.block_lse, z, others, scale, 0.0, candidates, diagonal)
        torch.testing.assert_close(lse.cpu().sum(0), expected_lse.sum(0))
        column_lse = torch.stack([torch.rand(columns) + 3, torch.zeros(columns)])
        for numbers in ((column_lse, torch.rand(columns)), (None, None)):
            options = (expected_lse, torch.rand(rows), others, *numbers, scale, 0.0, candidates)
            for actual, expected in zip(
                *both(ops.block_gradient, z, *options, diagonal), strict=True
            ):
                torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)

    def test_blocks_of_large_scores(self, losses) -> None:
        """All of them are about 2^18, exact in float32."""
        rows, columns = (
            torch.cat([torch.randint(-8, 8, (n, 6)) / 4.0, torch.full((n, 1), 512.0)], 1)
            for n in (20, 50)
        )
        scores = rows.double() @ columns.double().T
        options = (None, 1.0, OTHERS, None, "triton")
        rows, columns = losses.here(rows), losses.here(columns)
        lse = ops.block_lse(rows, columns, *options)
        exact = scores.logsumexp(1)
        torch.testing.assert_close(lse.cpu().double().sum(0), exact, rtol=0, atol=1e-6)
        grad = torch.linspace(0.5, 1.5, 20)
        gradient = ops.block_gradient(rows, lse, losses.here(grad), columns, None, None, *options)
        expected = (scores.softmax(1) * grad[:, None]) @ columns.cpu().double()
        torch.testing.assert_close(gradient[0].cpu().double(), expected, rtol=4e-7, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_bit_for_bit(self, losses, dtype) -> None:
        inputs = [z.to(dtype).requires_grad_() for z in pair(70, 20)]
        inputs.append(torch.tensor(0.2).requires_grad_())
        results = []
        for _ in range(2):
            loss = losses.nt_xent(*inputs, negatives=inputs[0].detach().flip(0))
            results.append([loss, *torch.autograd.grad(loss.sum(), inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_a_number_shows(self, losses, value) -> None:
        """In every anchor that has it for a candidate."""
        z0, z1 = pair(40, 20)
        z1[25, 3] = value
        assert losses.nt_xent(z0, z1).isnan().all()
        assert losses.dcl(z0, z1).isnan().all()
        assert losses.info_nce(z0, z1)[:40].isnan().all()
        assert losses.supcon(z1, torch.arange(40) % 3).isnan().all()
        assert not losses.nt_xent(z0, z1, unit=False).sum().isfinite()

    def test_vectors_shorter_than_the_least_norm(self, losses) -> None:
        z0, z1 = pair(6, 5)
        z0[2], z1[3] = 0, 1e-14
        assert_as_accurate(losses.nt_xent, partial(plain, reduction="none"), [z0, z1], FP32)


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(
    kernels: Any, features: int, dtype: torch.dtype, candidates: str, everything: bool
) -> list[Callable[[], None]]:
    count, place = 8192, CANDIDATES.index(candidates)
    z, numbers, lse = meta(count, features, dtype=dtype), meta(2 * count), meta(2, 2 * count)
    classes = (meta(2 * count, dtype=torch.int32), numbers) if everything else (None, None)
    inputs = (z, z, z if everything else None, *classes, meta() if everything else None)
    options = (2.0, place, True)
    return [
        lambda: kernels.contrast(*inputs, *options, numbers, lse),
        lambda: kernels.contrast_backward(numbers, *inputs, lse, *options, z, z, meta()),
    ]


# Architecture, features, dtype, candidates; with classes, further negatives and a learnt scale.
COMPILED = [
    (80, 128, BF16, OTHERS, False),
    (90, 128, BF16, OTHERS, True),
    (90, 300, FP16, OTHER_HALF, False),
    (90, 64, FP32, NEGATIVES, False),
    (100, 256, BF16, NEGATIVES, False),
]


@pytest.mark.parametrize("architecture, features, dtype, candidates, everything", COMPILED)
def test_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch, architecture, features, dtype, candidates, everything
) -> None:
    compiler, kernels = (importlib.import_module(name) for name in ("triton_compiler", KERNELS))
    monkeypatch.setattr(kernels, "generation", lambda device: architecture)
    for call in calls(kernels, features, dtype, candidates, everything):
        launches = compiler.launches(monkeypatch, kernels, call)
        assert launches
        for launch in launches:
            used = compiler.compile_for(architecture, launch)
            assert used.stack == 0, used
            assert used.shared <= compiler.MOST_SHARED[architecture], used
