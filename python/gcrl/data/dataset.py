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

    def draw(self, limit: int, seed: int) -> ImageSet:
        """At most so many of the images, chosen by the seed, in their order."""
        if len(self) <= limit:
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:limit]))


@dataclass(frozen=True)
class Dataset:
    """Images to train on and images to test with."""

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...] | None


def hold_out(everything: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out a fifth for testing, as draw_held_out does: (train, test), in the whole's order."""
    test = draw_held_out(len(everything), everything.labels, seed)
    return everything.take(np.flatnonzero(~test)), everything.take(np.flatnonzero(test))


def draw_held_out(
    count: int, labels: np.ndarray | None, seed: int, size: int | None = None
) -> np.ndarray:
    """Which of `count` to hold out, bool [count]: `size` of them, or a fifth (two at least).

    They are drawn by the seed from all classes alike; labels: int64 [count], where they are known.
    Raises DataError below four.
    """
    if count < 4:
        raise DataError(f"expected at least 4 images, to hold some out for testing; got {count}")
    order = np.random.default_rng(seed).permutation(count)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    held_out = size or max(2, count // 5)
    test = np.zeros(count, dtype=bool)
    test[order[((np.arange(held_out) + 0.5) * count / held_out).astype(int)]] = True
    return test
