"""What is evaluated, on which images, and where its results go."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from gcrl.data import Dataset, ImageSet
from gcrl.data.dataset import draw_held_out
from gcrl.evaluation.features import Features
from gcrl.evaluation.options import Options
from gcrl.evaluation.store import Store, array_digest, digest
from gcrl.run import Run

HELD_OUT = 5000  # training images to choose on, at most


class NotMeasuredError(ValueError):
    """A part that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A run and the images it is measured on."""

    run: Run
    dataset: Dataset
    folder: Path
    """Where results and features are kept."""
    options: Options = field(default_factory=Options)
    progress: bool = True

    @property
    def seed(self) -> int:
        return self.run.config.runtime.seed

    @cached_property
    def _parts(self) -> tuple[ImageSet, ImageSet]:
        """Training images to learn from and to choose on: all classes alike, by the run's seed.

        To choose on there are HELD_OUT of those that are not learned from, or else a tenth of all.
        """
        everything, limit = self.dataset.train, self.options.train_images
        limit = limit or self.run.config.evaluation.probe_train
        count = len(everything)
        held_out = min(HELD_OUT, max(count - limit, count // 10))
        if held_out < 2:
            return everything.draw(limit, self.seed), everything.take(np.arange(0))
        chosen = draw_held_out(count, everything.labels, self.seed, held_out)
        rest = everything.take(np.flatnonzero(~chosen))
        return rest.draw(limit, self.seed), everything.take(np.flatnonzero(chosen))

    @property
    def train(self) -> ImageSet:
        """Training images to learn from."""
        return self._parts[0]

    @property
    def validation(self) -> ImageSet:
        """Training images held out, to choose a layer and a strength on.

        Raises NotMeasuredError where there are too few to hold any out.
        """
        if not len(self._parts[1]):
            raise NotMeasuredError(
                "expected at least 20 training images, to hold a tenth out; got "
                f"{len(self.dataset.train)}"
            )
        return self._parts[1]

    @cached_property
    def test(self) -> ImageSet:
        """Test images, chosen by the run's seed."""
        limit = self.options.test_images or self.run.config.evaluation.probe_test
        return self.dataset.test.draw(limit, self.seed)

    @cached_property
    def fingerprint(self) -> bytes:
        """A hash of the images and labels."""
        sets = (*self._parts, self.test)
        arrays = [array_digest(array) for part in sets for array in (part.images, part.labels)]
        return digest(*arrays).encode()

    @cached_property
    def store(self) -> Store:
        return Store(self.folder / "features")

    @cached_property
    def features(self) -> Features:
        return self.features_of(self.run)

    def features_of(self, run: Run) -> Features:
        """Those of another network, as one that was trained further."""
        return Features(run, self.store, progress=self.progress)

    @cached_property
    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the training and test images, int64 [N] and [M].

        Raises NotMeasuredError where there are none, or only one class.
        """
        train, test = self.train.labels, self.test.labels
        if train is None or test is None:
            raise NotMeasuredError("the images have no labels")
        if len(np.unique(train)) < 2:
            raise NotMeasuredError("all training images are of one class")
        return train, test
