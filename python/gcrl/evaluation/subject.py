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

HELD_OUT = 5000  # training images to choose on; a tenth where there are fewer than 50,000


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
    def train(self) -> ImageSet:
        """Training images, chosen by the run's seed."""
        limit = self.options.train_images or self.run.config.evaluation.probe_train
        return self.dataset.train.draw(limit, self.seed)

    @cached_property
    def test(self) -> ImageSet:
        """Test images, chosen by the run's seed."""
        limit = self.options.test_images or self.run.config.evaluation.probe_test
        return self.dataset.test.draw(limit, self.seed)

    @cached_property
    def fingerprint(self) -> bytes:
        """A hash of the images and labels."""
        sets = (self.train, self.test)
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

    @cached_property
    def held_out(self) -> np.ndarray:
        """Which training images are held out to choose on, bool [N]: a share of every class."""
        size = min(HELD_OUT, len(self.train) // 10)
        if size < 2:
            raise NotMeasuredError(
                f"expected at least 20 training images, to hold a tenth out; got {len(self.train)}"
            )
        held_out = draw_held_out(len(self.train), self.train.labels, self.seed, size)
        if len(np.unique(self.labels[0][~held_out])) < 2:
            raise NotMeasuredError("without those held out, all training images are of one class")
        return held_out
