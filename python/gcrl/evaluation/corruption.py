"""How the linear probe's accuracy bears corrupted images, at five severities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from gcrl.config import ConfigError
from gcrl.evaluation import probe
from gcrl.evaluation.corruptions import CORRUPTIONS, MISSING, SEVERITIES, corrupt
from gcrl.evaluation.markdown import percent, rows
from gcrl.evaluation.options import stamp
from gcrl.evaluation.subject import Subject
from gcrl.figures import BLUE, GREY
from gcrl.paths import expand

PUBLISHED = (*CORRUPTIONS, *MISSING)
CIFAR10_C = (10_000, 32, 32, 3)  # one severity in a file of CIFAR-10-C


def inputs(subject: Subject) -> dict[str, Any]:
    options = subject.options
    return {"images": options.corruption_images, "cifar10_c": stamp(options.cifar10_c)}


def measure(subject: Subject) -> dict[str, Any]:
    """The probe is that of classification: trained on clean images, chosen on clean images."""
    options, features = subject.options, subject.features
    choice = probe.choose(subject)
    classifier = probe.train_probe(subject, choice)
    test = subject.test.draw(options.corruption_images, subject.seed)
    sets = _own(test.images, test.labels, subject.seed)
    source = "own"
    names: list[str] = list(CORRUPTIONS)
    if options.cifar10_c is not None:
        folder = expand(options.cifar10_c)
        names = [name for name in PUBLISHED if (folder / f"{name}.npy").is_file()]
        sets = _cifar10_c(folder, names, options.corruption_images, subject.seed)
        source = "CIFAR-10-C"
    accuracy: dict[str, list[float]] = {name: [] for name in names}
    total, count = len(names) * len(SEVERITIES), 0
    bar = tqdm(sets, "corruption", total, disable=not subject.progress, leave=False)
    for name, images, truth in bar:
        encoded = features.layer(images, choice.layer)
        accuracy[name].append(float(classifier.score(encoded, truth)))
        count = len(images)
    clean = classifier.score(features.layer(test.images, choice.layer), test.labels)
    return {
        "source": source,
        "grid": list(subject.run.config.model.grid),
        "images": count,
        "clean_images": len(test),
        "clean": float(clean),
        "severities": list(SEVERITIES),
        "corruptions": accuracy,
        "mean": np.mean(list(accuracy.values()), axis=0).tolist(),
        "missing": [name for name in PUBLISHED if name not in accuracy],
    }


def table(results: dict[str, Any]) -> str:
    height, width = results["grid"]
    if results["source"] == "CIFAR-10-C":
        source = f"the files of CIFAR-10-C, corrupted at 32x32 and brought to {height}x{width}"
        clean = "clean ones, which are not the same images."
    else:
        source = (
            f"our own implementations on images of {height}x{width}, with the lengths published "
            "for 32x32; not the files of CIFAR-10-C"
        )
        clean = "clean ones."
    lines = [*results["corruptions"].items(), ("mean", results["mean"])]
    header = ("accuracy at severity", *map(str, results["severities"]), "mean")
    text = [
        f"{results['images']:,} images of each, by {source}; {percent(results['clean'])} on "
        f"{results['clean_images']:,} {clean}",
        "",
        *rows(header, [(name, *values, float(np.mean(values))) for name, values in lines], percent),
    ]
    if results["missing"]:
        text += ["", f"Missing of the fifteen: {', '.join(results['missing'])}."]
    return "\n".join(text)


def draw(results: dict[str, Any], subject: Subject) -> dict[str, Figure]:
    """Accuracy against severity: the mean of all, and each on its own; severity 0 is clean."""
    columns = 5
    panels = ["mean", *results["corruptions"]]
    count = -(-len(panels) // columns)
    figure = Figure(figsize=(2.3 * columns, 1.9 * count), layout="constrained")
    grid = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False)
    severities = [0, *results["severities"]]
    for name, axes in zip(panels, grid.flat, strict=False):
        values = results["mean"] if name == "mean" else results["corruptions"][name]
        if name != "mean":
            axes.plot(severities, _percents(results, results["mean"]), color=GREY, alpha=0.5)
        axes.plot(severities, _percents(results, values), color=BLUE, marker="o", markersize=3)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xticks(severities)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("severity", fontsize=10)
    figure.supylabel("accuracy, %", fontsize=10)
    return {"corruption": figure}


def _percents(results: dict[str, Any], values: list[float]) -> list[float]:
    return [100 * value for value in (results["clean"], *values)]


def _own(
    images: np.ndarray, labels: np.ndarray | None, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            yield name, corrupt(images, name, severity, seed), labels


def _cifar10_c(
    folder: Path, names: list[str], limit: int, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Of each file NAME.npy, uint8 [50000, 32, 32, 3]: 10,000 images at each severity in turn.

    Raises ConfigError, naming the file, where one is of another shape or damaged.
    """
    if not names:
        raise ConfigError(f"{folder}: has none of CIFAR-10-C's files, such as gaussian_noise.npy")
    each = CIFAR10_C[0]
    shape = (len(SEVERITIES) * each, *CIFAR10_C[1:])
    labels = _load(folder / "labels.npy", shape[:1])
    chosen = np.sort(np.random.default_rng(seed).permutation(each)[:limit])
    for name in names:
        images = _load(folder / f"{name}.npy", shape)
        if images.dtype != np.uint8:
            raise ConfigError(f"{folder / name}.npy: expected uint8, got {images.dtype}")
        for severity in SEVERITIES:
            part = slice((severity - 1) * each, severity * each)
            yield name, images[part][chosen], labels[part][chosen].astype(np.int64)


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read as an .npy file: {error}") from error
    if array.shape != shape:
        raise ConfigError(f"{path}: expected {list(shape)}, got {list(array.shape)}")
    return array
