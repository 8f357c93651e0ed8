"""The whole network trained with labels, its generative loss kept or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from gcrl.config import ObjectiveConfig, OptimConfig
from gcrl.data import ImageSet
from gcrl.evaluation.markdown import number, percent, rows
from gcrl.evaluation.store import Store, array_digest
from gcrl.evaluation.subject import NotMeasuredError, Subject
from gcrl.figures import BLUE, GREY
from gcrl.palette import to_tokens
from gcrl.probes import calibration_error
from gcrl.run import Run
from gcrl.trainer import autocast, derive_seed, learning_rate, make_optimizer, update_averages
from gcrl.views import weak_view

KEPT = {"labels alone": 0.0, "generative loss kept": 1.0}  # its weight beside the cross-entropy
WARMUP = AVERAGED = 0.1  # shares of the steps; over the last of them the weights are averaged
STANDARDISED = 1000  # images by which the head is standardised, at most


class Head(nn.Module):
    """A linear classifier of a representation, standardised as it was before training.

    The representation is a mean over pixels, of which little differs between images: without that,
    a head of few steps sees almost a constant.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def standardise(self, features: Tensor) -> None:
        """Take mean and deviation from features [N, width]; what does not vary is not divided."""
        deviation = features.std(0, correction=0)
        varies = deviation > 1e-6 * features.abs().amax(0)  # more than by rounding
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(torch.where(varies, deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """[N, width] -> logits [N, classes]"""
        return self.linear((features.float() - self.mean) / self.deviation)


@dataclass(frozen=True)
class Classifier:
    """A run whose network was trained with labels, and the head on its representation."""

    run: Run
    head: Head
    classes: np.ndarray  # int64 [classes], the labels that the head's outputs stand for

    def logits(self, features: np.ndarray) -> np.ndarray:
        """The run's encodings, [N, width] -> [N, classes]."""
        with torch.no_grad():
            encoded = torch.from_numpy(features).to(self.head.mean)
            return self.head(encoded).double().cpu().numpy()


def inputs(subject: Subject) -> dict[str, Any]:
    options = subject.options
    return {
        "steps": options.finetuning_steps,
        "rate": options.finetuning_rate,
        "batch": subject.run.config.optim.batch_size,
    }


def measure(subject: Subject) -> dict[str, Any]:
    """Both ways start from the run's weights and see the same images in the same order."""
    _, labels = subject.labels
    pixels = subject.run.config.model.grid[0] * subject.run.config.model.grid[1]
    before = subject.features.log_prob(subject.test.images)
    results: dict[str, Any] = {
        "train_images": len(subject.train),
        "test_images": len(labels),
        "steps": subject.options.finetuning_steps,
        "batch_size": min(subject.run.config.optim.batch_size, len(subject.train)),
        "nats_per_pixel_before": float(-before.mean() / pixels),
        "ways": {},
    }
    for name in KEPT:
        classifier = _finetuned(subject, name)
        features = subject.features_of(classifier.run)
        probabilities = softmax(classifier.logits(features.encoding(subject.test.images)))
        correct = classifier.classes[probabilities.argmax(1)] == labels
        results["ways"][name] = {
            "accuracy": float(correct.mean()),
            "calibration_error": calibration_error(probabilities.max(1), correct),
            "nats_per_pixel": float(-features.log_prob(subject.test.images).mean() / pixels),
        }
    return results


def table(results: dict[str, Any]) -> str:
    lines = [
        (name, percent(way["accuracy"]), percent(way["calibration_error"]), way["nats_per_pixel"])
        for name, way in results["ways"].items()
    ]
    header = ("trained with", "accuracy", "calibration error", "nats per pixel")
    text = (
        f"{results['steps']:,} steps of {results['batch_size']} from {results['train_images']:,} "
        f"labelled images; {results['test_images']:,} test images, which needed "
        f"{results['nats_per_pixel_before']:.3f} nats per pixel before."
    )
    return "\n".join([text, "", *rows(header, lines, number)])


def draw(results: dict[str, Any], subject: Subject) -> dict[str, Figure]:
    """What each way gives for the labels, and what it costs the likelihood."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    accuracy, nats = figure.subplots(1, 2)
    ways = results["ways"]
    for axes, key, factor, title in (
        (accuracy, "accuracy", 100, "accuracy on test images, %"),
        (nats, "nats_per_pixel", 1, "nats per palette pixel"),
    ):
        values = [factor * way[key] for way in ways.values()]
        axes.bar_label(axes.barh(list(ways), values, color=BLUE), fmt="%.3g", padding=3)
        axes.set(title=title)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    nats.set_yticks([])
    nats.axvline(results["nats_per_pixel_before"], color=GREY, linestyle="--", linewidth=1)
    return {"finetuning": figure}


def found_inputs(subject: Subject) -> dict[str, Any]:
    """For the inputs of a part that measures what `find` gives."""
    try:
        names = sorted(_trained(subject))
    except NotMeasuredError:
        names = []
    return {"finetuned": [names, inputs(subject)] if names else []}


def _trained(subject: Subject) -> list[str]:
    """The names of the classifiers that were trained before with these options."""
    return [name for name in KEPT if _path(subject, name).is_file()]


def find(subject: Subject) -> dict[str, Classifier]:
    """The classifiers that were trained before with these options, by their names."""
    return {name: _finetuned(subject, name) for name in _trained(subject)}


def train_classifier(
    run: Run, images: ImageSet, optim: OptimConfig, *, alpha: float, progress: bool, name: str
) -> Classifier:
    """Train a copy of a run's network with labels: cross-entropy + alpha * nats per pixel.

    images are on the run's grid, seen as the run's weak views, in an order that follows from the
    run's seed. Precision and clipping are as in the run's own training, and so is the average of
    the weights, which is what is returned.
    """
    assert images.labels is not None
    classes, targets = np.unique(images.labels, return_inverse=True)
    seed, device = run.config.runtime.seed, run.device
    model = copy.deepcopy(run.model).train()
    head = Head(run.config.model.width, len(classes)).to(device)
    head.standardise(run.encode(images.draw(STANDARDISED, seed).images).to(device))
    both = nn.ModuleList((model, head))
    averages = {key: value.detach().clone() for key, value in both.named_parameters()}
    optimizer = make_optimizer(both, optim)
    pixels = torch.from_numpy(images.images).to(device)
    labels = torch.from_numpy(targets).to(device)
    objective = ObjectiveConfig(alpha=1.0, beta=0.0)
    devices = [device] if device.type == "cuda" else []
    batches = _batches(len(pixels), optim, seed)
    with torch.random.fork_rng(devices=devices):
        for step, batch in enumerate(
            tqdm(batches, name, optim.steps, disable=not progress, leave=False)
        ):
            torch.manual_seed(derive_seed(seed, "views", step))
            tokens = to_tokens(weak_view(pixels[batch], run.config.views), run.palette)
            with autocast(device, run.config.runtime):
                loss = F.cross_entropy(head(model.features(tokens)).float(), labels[batch])
                if alpha:
                    loss = loss + alpha * model(tokens, None, objective).generative
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), optim.clip)
            optimizer.step()
            update_averages(averages, both, optim.ema)
    with torch.no_grad():
        for key, parameter in both.named_parameters():
            parameter.copy_(averages[key])
    return Classifier(replace(run, model=model.eval()), head, classes)


def averaged(optim: OptimConfig) -> OptimConfig:
    """This schedule, with an average of the weights that has forgotten how they began.

    A run's own decay, meant for many steps, would return what a short training started from.
    """
    return replace(optim, ema=min(optim.ema, max(0.0, 1 - 1 / (AVERAGED * optim.steps))))


def softmax(logits: np.ndarray) -> np.ndarray:
    """[N, classes] -> probabilities."""
    return torch.from_numpy(logits).softmax(1).numpy()


def _batches(count: int, optim: OptimConfig, seed: int) -> Iterator[Tensor]:
    """Indices of each step's images: every epoch in an order of its own."""
    size = min(optim.batch_size, count)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(optim.steps):
        epoch, place = divmod(step, count // size)
        if place == 0:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            order = torch.randperm(count, generator=generator)
        yield order[place * size :][:size]


def kept_classifier(
    store: Store,
    path: Path,
    run: Run,
    images: ImageSet,
    optim: OptimConfig,
    *,
    alpha: float,
    name: str,
    progress: bool,
) -> Classifier:
    """What train_classifier trains, from the store's file if it is there."""
    assert images.labels is not None
    if (saved := store.network(path)) is not None:
        classes = np.unique(images.labels)
        model, head = copy.deepcopy(run.model), Head(run.config.model.width, len(classes))
        both = nn.ModuleDict({"model": model, "head": head.to(run.device)})
        both.load_state_dict(saved)
        return Classifier(replace(run, model=model), head, classes)
    classifier = train_classifier(run, images, optim, alpha=alpha, progress=progress, name=name)
    both = nn.ModuleDict({"model": classifier.run.model, "head": classifier.head})
    tensors = {key: value.detach().cpu().contiguous() for key, value in both.state_dict().items()}
    store.write(path, safetensors.torch.save(tensors))
    return classifier


def _finetuned(subject: Subject, name: str) -> Classifier:
    """The classifier of that name, trained unless it is in the store."""
    run, optim = subject.run, _schedule(subject)
    images = ImageSet(run.fit(subject.train.images).numpy(), subject.labels[0])
    return kept_classifier(
        subject.store, _path(subject, name), run, images, optim,
        alpha=KEPT[name], name=name, progress=subject.progress,
    )  # fmt: skip


def _schedule(subject: Subject) -> OptimConfig:
    """The run's own, but for steps and rate."""
    steps, rate = subject.options.finetuning_steps, subject.options.finetuning_rate
    optim = subject.run.config.optim
    return averaged(
        replace(optim, steps=steps, learning_rate=rate, warmup_steps=int(WARMUP * steps))
    )


def _path(subject: Subject, name: str) -> Path:
    ingredients = (
        subject.features.fingerprint, name.encode(),
        repr((_schedule(subject), subject.run.config.views, subject.seed)).encode(),
        array_digest(subject.train.images), array_digest(subject.labels[0]),
    )  # fmt: skip
    return subject.store.path("finetuned", ingredients, ".safetensors")
