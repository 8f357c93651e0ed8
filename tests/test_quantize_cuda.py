"""The CUDA quantize_colors: on the CPU in an emulator, and on a GPU where there is one.

The emulator runs threads in a random order between barriers: a missing one shows in the results.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import numpy as np
import pytest
import torch
from emulation import SANITIZERS, Emulator
from limits import HANG

from gcrl_kernels import backends

Quantize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def emulated(emulator: Emulator) -> Quantize:
    flags = SANITIZERS if emulator.sanitizes() else ()
    program = emulator.program("quantize_colors.cpp", *flags)

    def quantize(pixels: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
        name = str(pixels.dtype).removeprefix("torch.")
        words = [program, name, str(len(pixels)), str(len(palette))]
        given = pixels.numpy().tobytes() + palette.numpy().tobytes()
        done = subprocess.run(words, input=given, capture_output=True, timeout=HANG)
        assert done.returncode == 0, done.stderr.decode()
        return torch.from_numpy(np.frombuffer(done.stdout, np.int64).copy())

    return quantize


@pytest.fixture(params=["emulated", "gpu"])
def quantize(request: pytest.FixtureRequest) -> Quantize:
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    reason = backends.unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    operator = torch.ops.gcrl_kernels_cuda.quantize_colors
    return lambda pixels, palette: operator(pixels.cuda(), palette.cuda()).cpu()


def distances(pixels: torch.Tensor, palette: torch.Tensor) -> np.ndarray:
    """Squared distances [M, K]: exact in integers, else in float64."""
    exact = np.float64 if pixels.is_floating_point() else object
    difference = pixels.numpy().astype(exact)[:, None] - palette.numpy().astype(exact)[None]
    return np.square(difference).sum(-1)


# A block takes 512 pixels, and shares 512 colours at a time.
@pytest.mark.parametrize("count", [1, 511, 513])
@pytest.mark.parametrize("colors", [1, 511, 513, 1100])
def test_uint8_is_exact(quantize: Quantize, count: int, colors: int) -> None:
    pixels = torch.randint(0, 256, (count, 3), dtype=torch.uint8)
    palette = torch.randint(0, 9, (colors, 3), dtype=torch.int32) * 31
    expected = distances(pixels, palette).astype(np.int64).argmin(1)
    np.testing.assert_array_equal(quantize(pixels, palette), expected)


@pytest.mark.parametrize(("low", "high"), [(-2048, 2304), (-5000, 5000), (-(2**31), 2**31)])
def test_uint8_is_exact_for_any_int32_palette(quantize: Quantize, low: int, high: int) -> None:
    pixels = torch.randint(0, 256, (200, 3), dtype=torch.uint8)
    palette = torch.randint(low, high, (50, 3), dtype=torch.int64).int()
    palette = torch.cat([palette, torch.tensor([[high - 1, 1, 1], [high - 1, 1, 0]]).int()])
    for part in (palette, palette[-2:].contiguous()):
        np.testing.assert_array_equal(quantize(pixels, part), distances(pixels, part).argmin(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_are_nearest_to_rounding(quantize: Quantize, dtype: torch.dtype) -> None:
    pixels, palette = torch.rand(700, 3, dtype=dtype), torch.rand(600, 3, dtype=dtype)
    every = distances(pixels, palette)
    chosen = np.take_along_axis(every, quantize(pixels, palette).numpy()[:, None], 1)[:, 0]
    assert (chosen <= every.min(1) * (1 + 8 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite(quantize: Quantize, dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    palette = torch.tensor([[nan, 0, 0], [9, 9, 9], [0, inf, 0], [1, 1, 1]], dtype=dtype)
    pixels = torch.tensor([[0, 0, 0], [0, 0, nan], [inf, 0, 0], [8, 8, 8]], dtype=dtype)
    assert quantize(pixels, palette).tolist() == [3, -1, -1, 1]
    assert quantize(pixels, palette[:1]).tolist() == [-1, -1, -1, -1]
    far = torch.tensor([[1e20, 0, 0], [1, 1, 1]]).to(dtype) * (1e150 if dtype.itemsize == 8 else 1)
    assert quantize(far, palette[1:]).tolist()[0] == -1
