"""Classification from the frozen encoding: a linear probe on every layer, k-NN, few labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from gcrl.evaluation import probe
from gcrl.evaluation.markdown import percent, rows
from gcrl.evaluation.subject import Subject
from gcrl.figures import BLUE, GREY
from gcrl.probes import STRENGTHS, fit, nearest_neighbors


def inputs(subject: Subject) -> dict[str, Any]:
    options = subject.options
    return {
        "labels_per_class": options.labels_per_class,
        "draws": options.draws,
        "neighbors": subject.run.config.evaluation.neighbors,
    }


def measure(subject: Subject) -> dict[str, Any]:
    """Layer and strength are chosen on held-out training images; the test images are read once."""
    train_labels, test_labels = subject.labels
    choice = probe.choose(subject)
    names = subject.run.model.layer_names
    train, validation, test = (
        subject.features.layer(part.images, choice.layer)
        for part in (subject.train, subject.validation, subject.test)
    )
    classifier = fit(train, train_labels, choice.strength)
    classes, counts = np.unique(test_labels, return_counts=True)
    results: dict[str, Any] = {
        "train_images": len(train),
        "held_out": len(subject.validation),
        "test_images": len(test),
        "classes": len(np.unique(train_labels)),
        "chance": float(counts.max() / len(test)),
        "layer": names[choice.layer],
        "strength": choice.strength,
        "layers": [
            {"layer": name, "held_out_accuracy": float(best)}
            for name, best in zip(names, choice.accuracy.max(1), strict=True)
        ],
        "linear_probe": float(classifier.score(test, test_labels)),
        "few_labels": [],
        "notes": [],
    }
    unseen = np.setdiff1d(classes, train_labels)
    if len(unseen):
        results["notes"].append(
            f"{len(unseen)} classes of the test images are not among the training images."
        )
    neighbors = subject.run.config.evaluation.neighbors
    if neighbors > len(train):
        results["notes"].append(f"No k-NN: {neighbors} neighbours, but {len(train)} images.")
    else:
        knn = nearest_neighbors(train, train_labels, test, test_labels, neighbors)
        results["knn"] = {"neighbors": neighbors, "accuracy": knn}
    for count in subject.options.labels_per_class:
        few = _few_labels(subject, train, validation, test, count)
        if few is None:
            results["notes"].append(f"No probe of {count} labels a class: one class has fewer.")
        else:
            results["few_labels"].append(few)
    return results


def table(results: dict[str, Any]) -> str:
    lines = [("chance, the largest class", results["chance"])]
    lines.append((f"linear probe on '{results['layer']}'", results["linear_probe"]))
    if "knn" in results:
        knn = results["knn"]
        lines.append((f"k-NN, {knn['neighbors']} neighbours", knn["accuracy"]))
    for few in results["few_labels"]:
        spread = f"{percent(few['accuracy'])} ± {100 * few['deviation']:.1f}"
        lines.append((f"probe of {few['labels_per_class']} labels a class", spread))
    layers = [(entry["layer"], entry["held_out_accuracy"]) for entry in results["layers"]]
    text = [
        f"{results['test_images']:,} test images, {results['train_images']:,} training images; "
        f"{results['held_out']:,} others chose the layer and the strength C = "
        f"{results['strength']:g}, and the strength of each probe of few labels.",
        "",
        *rows(("on test images", "accuracy"), lines, percent),
        "",
        *rows(("linear probe on", "held-out accuracy"), layers, percent),
    ]
    for note in results["notes"]:
        text += ["", note]
    return "\n".join(text)


def draw(results: dict[str, Any], subject: Subject) -> dict[str, Figure]:
    """Accuracy over the layers, and over the labels of each class."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    layers, labels = figure.subplots(1, 2)
    names = [entry["layer"] for entry in results["layers"]]
    held_out = [100 * entry["held_out_accuracy"] for entry in results["layers"]]
    best = names.index(results["layer"])
    layers.plot(held_out, color=BLUE, marker="o")
    layers.plot(best, held_out[best], color=BLUE, marker="o", markersize=11)
    layers.set_xticks(range(len(names)), names, rotation=40, ha="right")
    layers.set(title="linear probe on each layer", ylabel="accuracy on held-out images, %")

    few = results["few_labels"]
    all_labels = results["train_images"] / results["classes"]
    counts = [*(entry["labels_per_class"] for entry in few), all_labels]
    accuracy = [*(entry["accuracy"] for entry in few), results["linear_probe"]]
    deviation = [*(entry["deviation"] for entry in few), 0.0]
    labels.errorbar(
        counts, 100 * np.array(accuracy), 100 * np.array(deviation), color=BLUE, marker="o",
        capsize=3,
    )  # fmt: skip
    labels.set_xscale("log")
    labels.set_xticks(counts, [f"{count:.0f}" for count in counts])
    labels.minorticks_off()
    labels.set(title=f"linear probe on '{results['layer']}'", xlabel="labels of each class",
               ylabel="accuracy on test images, %")  # fmt: skip
    labels.axhline(100 * results["chance"], color=GREY, linestyle="--", linewidth=1)
    for axes in (layers, labels):
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return {"classification": figure}


def _few_labels(
    subject: Subject, train: np.ndarray, validation: np.ndarray, test: np.ndarray, count: int
) -> dict[str, Any] | None:
    """The probe's accuracy from `count` labels of each class, over several draws of them.

    The strength is the one that does best on the held-out images, of which all labels are read.
    None where a class has too few.
    """
    labels, test_labels = subject.labels
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < count:
        return None
    accuracy = []
    draws = tqdm(range(subject.options.draws), f"{count} labels", disable=not subject.progress,
                 leave=False)  # fmt: skip
    for draw_number in draws:
        order = np.random.default_rng((subject.seed, count, draw_number)).permutation(len(train))
        chosen = np.concatenate([order[labels[order] == label][:count] for label in classes])
        probes = [fit(train[chosen], labels[chosen], strength) for strength in STRENGTHS]
        scores = [fitted.score(validation, subject.validation.labels) for fitted in probes]
        accuracy.append(probes[int(np.argmax(scores))].score(test, test_labels))
    return {
        "labels_per_class": count,
        "draws": len(accuracy),
        "accuracy": float(np.mean(accuracy)),
        "deviation": float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else 0.0,
    }
