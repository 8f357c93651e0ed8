"""scikit-learn's handwritten digits in random colours at random places."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from gcrl.data.dataset import Dataset, ImageSet, hold_out
from gcrl.data.resize import fit_to_grid

CANVAS = 16  # side of the square that an 8x8 digit is placed on
SEED = 0
BRIGHT = (128.0, 255.0)  # each channel of a digit's colour


def load(grid: tuple[int, int]) -> Dataset:
    """The 1,797 real digits: 1,438 to train on and 359 to test with, the same on every call.

    Each has its own bright colour, dimmed by its strokes' intensity, and its own place on a black
    16x16 canvas. Colour and place say nothing of the class, so pixels compared as they are say
    little.
    """
    digits = load_digits()
    rng = np.random.default_rng(SEED)
    images = _paint(digits.images, rng)
    everything = ImageSet(fit_to_grid(images, grid), digits.target.astype(np.int64))
    train, test = hold_out(everything, SEED)
    return Dataset("digits", train, test, tuple(str(digit) for digit in digits.target_names))


def _paint(strokes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """strokes float [N, 8, 8] in 0..16 -> uint8 [N, 16, 16, 3]."""
    count, side = len(strokes), strokes.shape[1]
    opacity = np.zeros((count, CANVAS, CANVAS, 1))
    for index, (top, left) in enumerate(rng.integers(0, CANVAS - side + 1, size=(count, 2))):
        opacity[index, top : top + side, left : left + side, 0] = strokes[index] / 16
    colour = rng.uniform(*BRIGHT, size=(count, 1, 1, 3))
    return np.rint(opacity * colour).astype(np.uint8)
