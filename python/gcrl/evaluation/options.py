"""What can be chosen of an evaluation: the flags of `gcrl evaluate`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gcrl.config import ConfigError
from gcrl.paths import expand, name_of


@dataclass(frozen=True)
class Options:
    """For the parts that they concern."""

    train_images: int | None = None
    """Labelled training images to learn from, at most; by default the run's --probe-train."""
    test_images: int | None = None
    """Test images to measure on, at most; by default the run's --probe-test."""
    labels_per_class: tuple[int, ...] = (4, 25, 400)
    """Labels of each class that classification gets by with."""
    draws: int = 5
    """Draws of so few labels, whose accuracy is averaged."""
    finetuning_steps: int = 300
    """Steps of finetuning, at the run's batch size."""
    finetuning_rate: float = 5e-4
    """Peak learning rate of finetuning."""
    ood: tuple[str, ...] = ()
    """Images unlike the run's, to be told apart: .npz files or folders of images."""
    inception: Path | None = None
    """File of Inception weights, as torch-fidelity reads them, for the Fréchet distance."""
    frechet_images: int = 10_000
    """Images to draw for the Fréchet distance."""
    cifar10_c: Path | None = None
    """Folder of CIFAR-10-C's .npy files, to be read in place of our own corruptions."""
    corruption_images: int = 1000
    """Test images to corrupt, at most."""

    def validate(self) -> Options:
        """These options; raises ConfigError, naming the field, for a value without meaning."""
        counts = {
            "train_images": self.train_images,
            "test_images": self.test_images,
            "labels_per_class": min(self.labels_per_class, default=None),
            "draws": self.draws,
            "finetuning_steps": self.finetuning_steps,
            "corruption_images": self.corruption_images,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if self.frechet_images < 2:
            raise ConfigError(f"frechet_images: expected at least 2, got {self.frechet_images}")
        if not 0 < self.finetuning_rate < float("inf"):
            raise ConfigError(
                f"finetuning_rate: expected a number above 0, got {self.finetuning_rate}"
            )
        for path in (self.inception, self.cifar10_c, *map(Path, self.ood)):
            if path is not None and not expand(path).exists():
                raise ConfigError(f"{path}: no such file or folder")
        names = [ood_name(source) for source in self.ood]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"ood: expected different names, got {name!r} twice")
        return self


def ood_name(source: str) -> str:
    """What the images of a file or folder are called."""
    return re.sub(r"\.npz$", "", name_of(source))


def stamp(source: str | Path | None) -> list[list[str | int]]:
    """Name, size and time of a file, or of all files in a folder: it changes when they do."""
    if source is None:
        return []
    from gcrl.data.walk import walk  # not for the help alone: it imports Pillow and scikit-learn

    path = expand(source).absolute()
    files = [file.path for file in walk(path)] if path.is_dir() else [path]
    states = [(file, file.stat()) for file in files if file.is_file()]
    return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]
