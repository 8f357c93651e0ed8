"""Images drawn from the run, test images completed, and their Fréchet distance to real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from gcrl.config import ConfigError
from gcrl.evaluation.options import stamp
from gcrl.evaluation.subject import Subject
from gcrl.figures import completion_figure, sample_figure
from gcrl.paths import expand


def inputs(subject: Subject) -> dict[str, Any]:
    options = subject.options
    return {
        "inception": stamp(options.inception),
        "frechet_images": options.frechet_images if options.inception else None,
        "sample_count": subject.run.config.evaluation.sample_count,
    }


def measure(subject: Subject) -> dict[str, Any]:
    """The Fréchet distance between generated images and test images on the run's grid."""
    options = subject.options
    if options.inception is None:
        return {"notes": ["No Fréchet distance: it takes --inception, a file of weights."]}
    if len(subject.test) < 2:
        raise ConfigError("inception: expected at least 2 test images for the Fréchet distance")
    metric = inception_metric(options.inception)
    real = subject.run.fit(subject.test.images)
    generated = draw_images(subject, options.frechet_images)
    distance = frechet_distance(real, generated, metric, subject.progress)
    return {
        "frechet_distance": distance,
        "generated": options.frechet_images,
        "real": len(real),
        "notes": [],
    }


def table(results: dict[str, Any]) -> str:
    lines = ["samples.png: images drawn from the run beside real ones; completions.png: the lower",
             "half of test images drawn anew."]  # fmt: skip
    if "frechet_distance" in results:
        lines += ["", f"Fréchet distance {results['frechet_distance']:.1f}, of "
                  f"{results['generated']:,} images drawn to {results['real']:,} test images on "
                  "the run's grid in all their colours."]  # fmt: skip
    return "\n".join([*lines, *(f"\n{note}" for note in results["notes"])])


def draw(results: dict[str, Any], subject: Subject) -> dict[str, Figure]:
    return {
        "samples": sample_figure(subject.run, subject.dataset),
        "completions": completion_figure(subject.run, subject.dataset),
    }


def draw_images(subject: Subject, count: int) -> Tensor:
    """So many images of the run, uint8 [count, H, W, 3]; kept, so that they are drawn once."""

    def compute() -> np.ndarray:
        return subject.run.sample(count, seed=subject.seed, progress=subject.progress).numpy()

    ingredients = (subject.features.fingerprint, repr((count, subject.seed)).encode())
    return torch.from_numpy(subject.store.get("samples", ingredients, compute))


def inception_metric(weights: Path) -> FrechetInceptionDistance:
    """The distance in the features of torch-fidelity's InceptionV3 with the weights of this file.

    Raises ConfigError where the package is not installed or the file is of another kind.
    """
    path = str(expand(weights))
    try:
        return FrechetInceptionDistance(2048, feature_extractor_weights_path=path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "inception: the Fréchet distance needs the package torch-fidelity: "
            "pip install torch-fidelity"
        ) from error
    except Exception as error:  # a file of another kind fails in torch, each its own way
        raise ConfigError(f"{weights}: cannot be read as Inception weights: {error}") from error


def frechet_distance(
    real: Tensor, generated: Tensor, metric: FrechetInceptionDistance, progress: bool = False
) -> float:
    """Between images uint8 [N, H, W, 3] and [M, H, W, 3]."""
    for is_real, images in ((True, real), (False, generated)):
        for batch in tqdm(images.split(64), "Inception", disable=not progress, leave=False):
            metric.update(batch.permute(0, 3, 1, 2), real=is_real)
    return float(metric.compute())
