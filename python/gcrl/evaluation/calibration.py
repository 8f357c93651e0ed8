"""Calibration: does a classifier that is 80% sure turn out right 80% of the time?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gcrl.evaluation import finetuning, probe
from gcrl.evaluation.finetuning import softmax
from gcrl.evaluation.markdown import percent, rows
from gcrl.evaluation.subject import Subject
from gcrl.figures import BLUE, GREY
from gcrl.probes import CALIBRATION_BINS, calibration_error


def inputs(subject: Subject) -> dict[str, Any]:
    return finetuning.found_inputs(subject)


def measure(subject: Subject) -> dict[str, Any]:
    """Of the linear probe, and of what finetuning has left."""
    labels, images = subject.labels[1], subject.test.images
    choice = probe.choose(subject)
    classifier = probe.train_probe(subject, choice)
    probabilities = classifier.predict_proba(subject.features.layer(images, choice.layer))
    measured = {"linear probe": reliability(probabilities, classifier.classes_, labels)}
    for name, finetuned in finetuning.find(subject).items():
        encoding = subject.features_of(finetuned.run).encoding(images)
        probabilities = softmax(finetuned.logits(encoding))
        measured[f"finetuned, {name}"] = reliability(probabilities, finetuned.classes, labels)
    return {"test_images": len(labels), "bins": CALIBRATION_BINS, "classifiers": measured}


def table(results: dict[str, Any]) -> str:
    lines = [
        (name, *(found[key] for key in ("accuracy", "confidence", "calibration_error")))
        for name, found in results["classifiers"].items()
    ]
    header = ("", "accuracy", "mean confidence", f"ECE, {results['bins']} bins")
    return "\n".join(
        [f"{results['test_images']:,} test images.", "", *rows(header, lines, percent)]
    )


def draw(results: dict[str, Any], subject: Subject) -> dict[str, Figure]:
    """Reliability diagrams: accuracy against confidence; below, how many images have it."""
    classifiers = results["classifiers"]
    figure = Figure(figsize=(3.8 * len(classifiers), 4.6), layout="constrained")
    grid = figure.subplots(
        2, len(classifiers), squeeze=False, sharex=True, height_ratios=(3, 1), sharey="row"
    )
    edges = np.linspace(0, 1, results["bins"] + 1)
    for (name, found), axes, counts in zip(classifiers.items(), grid[0], grid[1], strict=True):
        filled = [entry for entry in found["reliability"] if entry["images"]]
        confidence = [entry["confidence"] for entry in filled]
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axes.plot(confidence, [entry["accuracy"] for entry in filled], color=BLUE, marker="o")
        axes.set(title=f"{name}\nECE {percent(found['calibration_error'])}", ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        counts.stairs([entry["images"] for entry in found["reliability"]], edges, fill=True,
                      color=BLUE, alpha=0.7)  # fmt: skip
        counts.set(xlabel="confidence", xlim=(0, 1))
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("images")
    return {"calibration": figure}


def reliability(
    probabilities: np.ndarray, classes: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """Of probabilities [N, classes], the labels they stand for [classes] and the true ones [N]."""
    confidence = probabilities.max(1)
    correct = classes[probabilities.argmax(1)] == labels
    place = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = []
    for number in range(CALIBRATION_BINS):
        inside = place == number
        some = bool(inside.any())
        bins.append(
            {
                "images": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if some else None,
                "accuracy": float(correct[inside].mean()) if some else None,
            }
        )
    return {
        "accuracy": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "calibration_error": calibration_error(confidence, correct),
        "reliability": bins,
    }
