"""The short measurement at the end of training: both losses, a linear probe and k-NN."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from gcrl.checkpoint import replace_file
from gcrl.data import Dataset, ImageSet
from gcrl.evaluation.likelihood import notes_on
from gcrl.evaluation.markdown import number, percent, rows
from gcrl.evaluation.subject import Subject
from gcrl.palette import to_tokens
from gcrl.probes import NotFiniteError, linear_probe, nearest_neighbors
from gcrl.run import Run
from gcrl.views import differ, make_views
from gcrl_kernels import nt_xent

_SOURCES = {"run": "this run", "untrained": "untrained network", "raw_pixels": "raw pixels"}


def inputs(subject: Subject) -> dict[str, Any]:
    return {"config": subject.run.config.to_dict()}


def measure(subject: Subject) -> dict[str, Any]:
    return evaluate(subject.run, subject.dataset, progress=subject.progress)


def draw(results: dict[str, Any], subject: Subject) -> dict[str, Figure]:
    """None: its numbers are few."""
    return {}


def evaluate(run: Run, dataset: Dataset, *, progress: bool = True) -> dict[str, Any]:
    """Measure a run on a dataset; the result is ready for JSON and for `table`.

    Losses are measured on test images, at most evaluation.probe_test of them; the linear probe and
    k-NN on the same ones, from at most evaluation.probe_train labelled training images. The run's
    seed chooses both, the same for encoding, untrained network and raw pixels. Where something
    cannot be measured, as accuracy without labels, it is left out and "notes" says why.
    Raises NotFiniteError where the network's outputs are not finite.
    """
    settings, seed = run.config.evaluation, run.config.runtime.seed
    test = dataset.test.draw(settings.probe_test, seed)
    train = dataset.train.draw(settings.probe_train, seed)
    results: dict[str, Any] = {
        "dataset": dataset.name,
        "step": run.step,
        "seed": seed,
        "test_images": len(test),
        "likelihood": likelihood(run, test.images, progress=progress),
        "notes": _loss_notes(run),
    }
    if differ(run.config.views):
        results["contrastive"] = contrastive(run, test.images)
    accuracy = _accuracy(run, train, test, results["notes"], progress)
    if accuracy:
        results |= {"train_images": len(train), "accuracy": accuracy}
    return results


def likelihood(run: Run, images: np.ndarray, *, progress: bool = False) -> dict[str, float]:
    """Mean negative log-likelihood of the images over all pixels; a uniform guess beside it."""
    height, width = run.config.model.grid
    nats = -run.log_prob(images, progress=progress).double().mean().item()
    return {
        "nats_per_pixel": _finite("log-probability", nats / (height * width)),
        "bits_per_pixel": nats / (height * width) / math.log(2),
        "nats_per_image": nats,
        "pixels": height * width,
        "uniform_nats_per_pixel": math.log(run.config.model.colors),
    }


def contrastive(run: Run, images: np.ndarray) -> dict[str, float]:
    """Mean NT-Xent over pairs of views of the images, drawn under the run's seed.

    The loss depends on how many pairs are compared at once: the run's batch size here, or all
    images where they are fewer. A last, smaller batch is left out.
    """
    pairs = min(run.config.optim.batch_size, len(images))
    temperature = run.config.objective.temperature
    devices = [run.device] if run.device.type == "cuda" else []
    losses = []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(run.config.runtime.seed)
        for start in range(0, len(images) - pairs + 1, pairs):
            batch = run.fit(images[start : start + pairs]).to(run.device)
            weak, strong = make_views(batch, run.config.views)
            loss = nt_xent(_project(run, weak), _project(run, strong), temperature=temperature)
            losses.append(loss.item())
    return {
        "nt_xent": _finite("contrastive loss", float(np.mean(losses))),
        "pairs": pairs,
        "chance": math.log(2 * pairs - 1),
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    loss = results["likelihood"]
    uniform = loss["uniform_nats_per_pixel"]
    losses = [
        ("nats per pixel", loss["nats_per_pixel"], uniform),
        ("bits per pixel", loss["bits_per_pixel"], uniform / math.log(2)),
        ("nats per image", loss["nats_per_image"], uniform * loss["pixels"]),
    ]
    if "contrastive" in results:
        views = results["contrastive"]
        losses.append((f"NT-Xent, {views['pairs']} pairs", views["nt_xent"], views["chance"]))
    counts = f"{results['test_images']:,} test images"
    if "accuracy" in results:
        counts += f", {results['train_images']:,} labelled training images"
    lines = [
        f"{results['dataset']}, step {results['step']:,}, seed {results['seed']}: {counts}.",
        "",
        *rows(("loss on test images", "this run", "chance"), losses, number),
    ]
    if "accuracy" in results:
        lines += ["", *rows(("on test images", *_SOURCES.values()), _measures(results), percent)]
    for note in results["notes"]:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def write_results(folder: str | Path, results: dict[str, Any]) -> None:
    """Write results.json and results.md into a run's folder."""
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    replace_file(Path(folder) / "results.json", text.encode())
    replace_file(Path(folder) / "results.md", table(results).encode())


def _accuracy(
    run: Run, train: ImageSet, test: ImageSet, notes: list[str], progress: bool
) -> dict[str, dict[str, float]] | None:
    """By source of features; None, and a note why, where no classifier can be trained."""
    if train.labels is None or test.labels is None:
        notes.append("No linear probe and no k-NN: the images have no labels.")
        return None
    if len(np.unique(train.labels)) < 2:
        notes.append("No linear probe and no k-NN: all training images are of one class.")
        return None
    seed, neighbors = run.config.runtime.seed, run.config.evaluation.neighbors
    if neighbors > len(train):
        notes.append(f"No k-NN: {neighbors} neighbours, but {len(train)} training images.")
    accuracy = {}
    for source in _SOURCES:
        train_features, test_features = _features(run, source, (train, test), progress)
        sets = (train_features, train.labels, test_features, test.labels)
        probe = linear_probe(*sets, seed=seed)
        accuracy[source] = {
            "linear_probe": probe.accuracy,
            "calibration_error": probe.calibration_error,
            "strength": probe.strength,
        }
        if neighbors <= len(train):
            accuracy[source]["knn"] = nearest_neighbors(*sets, neighbors)
            accuracy[source]["neighbors"] = neighbors
    return accuracy


def _features(
    run: Run, source: str, parts: tuple[ImageSet, ...], progress: bool
) -> list[np.ndarray]:
    """What a probe reads, float32 [N, features] of each part."""
    if source == "raw_pixels":
        return [(run.fit(part.images).flatten(1) / 255).numpy() for part in parts]
    encoder = run if source == "run" else run.untrained()
    return [encoder.encode(part.images, progress=progress).numpy() for part in parts]


def _project(run: Run, view: Tensor) -> Tensor:
    tokens = to_tokens(view, run.palette)  # [B, H, W]
    return run.model.project(run.model.features(tokens))


def _loss_notes(run: Run) -> list[str]:
    objective = run.config.objective
    notes = notes_on(objective)
    if not differ(run.config.views):
        notes.append("No NT-Xent: both views of an image are always the same.")
    elif objective.beta == 0:
        notes.append("beta is 0: the projection was not trained, and NT-Xent shows it.")
    return notes


def _measures(results: dict[str, Any]) -> Iterator[tuple[str | float, ...]]:
    accuracy = results["accuracy"]
    yield ("linear probe, accuracy", *(accuracy[s]["linear_probe"] for s in _SOURCES))
    yield ("linear probe, calibration error", *(accuracy[s]["calibration_error"] for s in _SOURCES))
    if "knn" in accuracy["run"]:
        name = f"k-NN, {accuracy['run']['neighbors']} neighbours, accuracy"
        yield (name, *(accuracy[s]["knn"] for s in _SOURCES))


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise NotFiniteError(
            f"the run's {name} on test images is {value}: has its training diverged?"
        )
    return value
