"""scikit-learn's handwritten digits in random colours at random places."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from gcrl.data.dataset import Dataset, ImageSet, draw_held_out
from gcrl.data.resize import fit_to_grid

NAME = "digits"
CANVAS = 16  # side of the square that an 8x8 digit is placed on
COPIES = 4  # paintings of each digit
SEED = 0
BRIGHT = (128.0, 255.0)  # each channel of a digit's colour


def load(grid: tuple[int, int]) -> Dataset:
    """The 1,797 real digits, each painted four times: 5,752 images to train on and 1,436 to test.

    The four of a digit are in one part, 1,438 digits to train on and 359 to test; all of it is the
    same on every call. Each image has its own bright colour, dimmed by its strokes' intensity, and
    its own place on a black 16x16 canvas. Colour and place say nothing of the class, so pixels
    compared as they are say little.
    """
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    held_out = draw_held_out(len(labels), labels, SEED)
    rng = np.random.default_rng(SEED)
    train, test = (
        ImageSet(
            fit_to_grid(_paint(np.tile(digits.images[part], (COPIES, 1, 1)), rng), grid),
            np.tile(labels[part], COPIES),
        )
        for part in (~held_out, held_out)
    )
    return Dataset(NAME, train, test, tuple(str(digit) for digit in digits.target_names))


def _paint(strokes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """strokes float [N, 8, 8] in 0..16 -> uint8 [N, 16, 16, 3]."""
    count, side = len(strokes), strokes.shape[1]
    opacity = np.zeros((count, CANVAS, CANVAS, 1))
    for index, (top, left) in enumerate(rng.integers(0, CANVAS - side + 1, size=(count, 2))):
        opacity[index, top : top + side, left : left + side, 0] = strokes[index] / 16
    colour = rng.uniform(*BRIGHT, size=(count, 1, 1, 3))
    return np.rint(opacity * colour).astype(np.uint8)
