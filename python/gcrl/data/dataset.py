"""What a loaded data set is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class DataError(ValueError):
    """A source of images that cannot be used; the message says which file and what is wrong."""


@dataclass(frozen=True)
class ImageSet:
    """Images, and their classes where they are known."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray | None  # int64 [N]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, int64 [n], in that order."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageSet(self.images[indices], labels)


@dataclass(frozen=True)
class Dataset:
    """Images to train on and images to test with."""

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...] | None


def hold_out(everything: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out a fifth (two images at least) for testing, drawn by the seed from all classes alike.

    Returns (train, test), each in the order of the whole. Raises DataError below four images.
    """
    count = len(everything)
    if count < 4:
        raise DataError(f"expected at least 4 images, to hold some out for testing; got {count}")
    order = np.random.default_rng(seed).permutation(count)
    if everything.labels is not None:
        order = order[np.argsort(everything.labels[order], kind="stable")]
    held_out = max(2, count // 5)
    test = np.zeros(count, dtype=bool)
    test[order[((np.arange(held_out) + 0.5) * count / held_out).astype(int)]] = True
    return everything.take(np.flatnonzero(~test)), everything.take(np.flatnonzero(test))
