"""The losses in CUDA C++: on the CPU in an emulator, and on a GPU where there is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from color_cross_entropy_kernels import FP32, KernelTests, Losses
from comparison import assert_as_accurate
from emulation import Emulator
from nvcc_report import resources
from test_color_cross_entropy import plain
from torch import Tensor

from gcrl_kernels import backends
from gcrl_kernels.color_cross_entropy import launch, ops


@contextmanager
def emulated(library: str | Path) -> Iterator[Losses]:
    """The backend with an emulated library in place of the compiled one."""
    torch.ops.load_library(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "gcrl_kernels_cuda", torch.ops.gcrl_kernels_emulated)
        yield Losses("cuda", "cpu")


@pytest.fixture(scope="class", params=["emulated", "gpu"])
def losses(request: pytest.FixtureRequest) -> Iterator[Losses]:
    if request.param == "emulated":
        emulator: Emulator = request.getfixturevalue("emulator")
        with emulated(emulator.library("color_cross_entropy.cpp", "-O1")) as here:
            yield here
        return
    reason = backends.unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    yield Losses("cuda", "cuda")


class TestCuda(KernelTests):
    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"logits": (5, 4097)}, "logits: expected 1 to 4096 colours, got 4097"),
            ({"logits": (2, 5, 7)}, "logits: expected [M, K], got 3 dimensions"),
            ({"dtype": torch.float64}, "logits: expected float32, float16 or bfloat16"),
            ({"tokens": (4,)}, "tokens: expected a number for each of 5 positions"),
            ({"loss": (4,)}, "loss: expected a number for each of 5 positions"),
            ({"gradient": (5, 8)}, "gradient: expected the shape of logits"),
        ],
    )
    def test_what_is_refused(self, losses, changed, message) -> None:
        def tensor(name: str, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
            return torch.zeros(changed.get(name, shape), dtype=dtype, device=losses.device)

        dtype: Any = changed.get("dtype", FP32)
        with pytest.raises(RuntimeError, match=re.escape(message)):
            torch.ops.gcrl_kernels_cuda.color_cross_entropy(
                tensor("logits", 5, 7, dtype=dtype), tensor("tokens", 5, dtype=torch.long), None,
                None, 0.0, 0.0, tensor("loss", 5), tensor("z_term", 5), None, None,
                tensor("gradient", 5, 7, dtype=dtype),
            )  # fmt: skip

    @pytest.mark.parametrize("offset", [1e4, -1e6])
    @pytest.mark.parametrize("colors", [7, 600])
    def test_what_is_added_to_all_logits_changes_no_gradient(self, losses, colors, offset) -> None:
        """float32 holds the sums exactly."""
        logits = torch.randint(-99, 99, (9, colors)) / 16
        targets = (torch.randint(0, colors, (9,)), None)
        weights = torch.rand(9) + 0.5

        def of_logits(logits: Tensor) -> Tensor:
            return losses.of_logits(logits, targets)[0] * weights

        def of_linear(logits: Tensor) -> Tensor:
            unit = torch.eye(colors)
            return losses.of_linear(logits, unit, None, targets, reduction="none") * weights

        def apart(logits: Tensor) -> Tensor:
            return plain(logits - offset, targets[0], reduction="none") * weights

        for ours in (of_logits, of_linear):
            assert_as_accurate(ours, apart, [logits + offset], FP32, scale=1.0)

    @pytest.mark.parametrize("colors", [7, 600])
    def test_any_byte_of_a_mask_but_zero_is_true(self, losses, colors) -> None:
        """And what a row holds that is left out is nowhere: targets, logits and upstream."""
        bytes_ = (torch.arange(9) % 4 * 85).to(torch.uint8)  # 0, 85, 170, 255
        counts, grad = bytes_ > 0, torch.rand(9)
        exact = torch.randn(9, colors, dtype=torch.float64, requires_grad=True)
        tokens = torch.randint(0, colors, (9,))
        loss = torch.nn.functional.cross_entropy(exact, tokens, reduction="none") * counts
        (expected,) = torch.autograd.grad(loss, exact, grad.double())
        logits = exact.detach().float()
        logits[~counts], tokens[~counts], grad[~counts] = torch.nan, -1, torch.nan
        logits, grad, tokens, mask = map(
            losses.here, (logits, grad, tokens, bytes_.view(torch.bool))
        )
        ours, z_term, lse, found, gradient = (
            *(torch.full(n, torch.nan, device=losses.device) for n in ((9,), (9,), (2, 9))),
            torch.full((9,), -7, device=losses.device),
            torch.full_like(logits, torch.nan),
        )
        library, nothing = torch.ops.gcrl_kernels_cuda, (0.0, 0.0)
        library.color_cross_entropy(
            logits, tokens, None, mask, *nothing, ours, z_term, lse, found, gradient
        )
        torch.testing.assert_close(ours.cpu(), loss.detach().float())
        sums = gradient.cpu().nan_to_num(torch.inf) * grad.cpu().nan_to_num()[:, None]
        torch.testing.assert_close(sums, expected.float(), rtol=1e-5, atol=1e-6)
        library.color_cross_entropy_backward(
            grad, logits, tokens, mask, lse, *nothing, gradient.fill_(torch.nan)
        )
        torch.testing.assert_close(gradient.cpu(), expected.float(), rtol=1e-5, atol=1e-6)


def test_what_the_gpu_backends_cannot() -> None:
    for backend in ("cuda", "triton"):
        assert ops.cannot(backend, torch.bfloat16, 4096) is None
        too_many = ops.cannot(backend, torch.bfloat16, 4097)
        assert too_many == "it takes up to 4096 colours, got 4097"
        assert "got torch.float64" in str(ops.cannot(backend, torch.float64, 2))
    assert ops.cannot("reference", torch.float64, 5000) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("colors", [2, 512, 4096])
@pytest.mark.parametrize("features", [16, 512, 4096])
def test_what_is_stored_beside_the_gradients_is_bounded(dtype, colors, features) -> None:
    """However many positions there are."""
    hidden = torch.empty(2**24, features, dtype=dtype, device="meta")
    weight = torch.empty(colors, features, dtype=dtype, device="meta")
    mask = torch.empty(2**24, dtype=torch.bool, device="meta")
    chunks = launch._Chunks(hidden, weight, None, mask, [True] * 3)
    tokens_and_losses = (8 + 4 + 4) * launch.MOST_POSITIONS
    assert chunks.logits.nbytes + chunks.counted.nbytes + tokens_and_losses <= 64 << 20
    assert chunks.rows >= 1024


SANITIZED = """
import sys, torch
import missing
missing.stand_in_for_hypothesis()
import color_cross_entropy_kernels as cases
import test_color_cross_entropy_cuda as tests
suite = tests.TestCuda()
with tests.emulated(sys.argv[1]) as losses:
    for case in cases.CASES:
        torch.manual_seed(0)
        suite.test_logits_as_accurate_as_pytorch(losses, *case)
    for case in cases.LINEAR_CASES[:4]:
        torch.manual_seed(0)
        suite.test_linear_as_accurate_as_pytorch(losses, *case)
print("done")
"""


def test_within_its_memory(emulator: Emulator) -> None:
    """A sample under the sanitizers of addresses and of undefined behaviour."""
    emulator.run_sanitized(SANITIZED, "color_cross_entropy.cpp")


def test_compiles_without_spills_or_stack(
    root: Path, setup_script: ModuleType, tmp_path: Path
) -> None:
    """By the compiler's own report of each kernel for each architecture."""
    compiled = resources(root, setup_script, tmp_path, "color_cross_entropy/cuda.cu")
    for kernel in ("softmax_forward", "softmax_backward", "nearest_color"):
        assert any(kernel in each.kernel for each in compiled)
    assert [each for each in compiled if each.stack or each.spill_stores or each.spill_loads] == []
