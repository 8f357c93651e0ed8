"""Out-of-distribution detection: telling other images from the run's test images.

Every score is higher where an image looks less familiar. AUROC and AUPR take the other images as
the positive class; FPR is the share of them that is accepted when 95% of the test images are kept.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from gcrl.data import load_dataset
from gcrl.evaluation import finetuning, probe
from gcrl.evaluation.features import Features
from gcrl.evaluation.finetuning import softmax
from gcrl.evaluation.likelihood import notes_on
from gcrl.evaluation.markdown import percent, rows
from gcrl.evaluation.options import ood_name, stamp
from gcrl.evaluation.subject import NotMeasuredError, Subject
from gcrl.run import Run

KEPT = 0.95  # share of the test images that is accepted
BINS = 60

Score = Callable[[np.ndarray], np.ndarray]  # images uint8 [N, H, W, 3] -> [N]


def inputs(subject: Subject) -> dict[str, Any]:
    return {
        "ood": [[ood_name(source), stamp(source)] for source in subject.options.ood],
        "neighbors": subject.run.config.evaluation.neighbors,
        **finetuning.found_inputs(subject),
    }


def measure(subject: Subject) -> dict[str, Any]:
    """All scores on all sets; the unsupervised ones never read a label."""
    if not subject.options.ood:
        raise NotMeasuredError("it takes --ood, .npz files or folders of images unlike the run's")
    sets = {ood_name(source): read_images(subject, source) for source in subject.options.ood}
    unsupervised = unsupervised_scores(subject)
    results: dict[str, Any] = {
        "test_images": len(subject.test),
        "train_images": len(subject.train),
        "unsupervised": list(unsupervised),
        "supervised": [],
        "sets": {},
        "notes": notes_on(subject.run.config.objective),
    }
    nearest = _neighbor_score(subject)
    if nearest not in unsupervised:
        results["notes"].append(f"No {nearest}, but {len(subject.train)} training images.")
    supervised: dict[str, Score] = {}
    try:
        supervised = supervised_scores(subject)
    except NotMeasuredError as error:
        results["notes"].append(f"No supervised scores: {error}.")
    results["supervised"] = list(supervised)
    scores = {**unsupervised, **supervised}
    inside = {name: score(subject.test.images) for name, score in scores.items()}
    pixels = math.prod(subject.run.config.model.grid)
    nats = {"test images": inside["likelihood"] / pixels}
    for name, images in sets.items():
        outside = {score: function(images) for score, function in scores.items()}
        measured = {score: detection(inside[score], outside[score]) for score in scores}
        results["sets"][name] = {"images": len(images), "scores": measured}
        nats[name] = outside["likelihood"] / pixels
    results["notes"] += _more_likely(results["sets"])
    results["nats_per_pixel"] = _histograms(nats)
    return results


def _neighbor_score(subject: Subject) -> str:
    return f"distance to neighbour {subject.run.config.evaluation.neighbors}"


def _more_likely(sets: dict[str, Any]) -> list[str]:
    """A note that names the sets which the likelihood takes for the run's own, if there are any."""
    found = {name: part["scores"]["likelihood"]["auroc"] for name, part in sets.items()}
    likely = [f"{name} (AUROC {percent(auroc)})" for name, auroc in found.items() if auroc < 0.5]
    if not likely:
        return []
    return [
        f"The run finds these more likely than its own test images: {', '.join(likely)}. The "
        "likelihood alone does not tell them apart (Nalisnick et al. 2019). Often simple images "
        "are likely wherever they are from; whether these are simple, their compressed size tells."
    ]


def table(results: dict[str, Any]) -> str:
    counts = ", ".join(f"{part['images']:,} of {name}" for name, part in results["sets"].items())
    text = [
        f"{results['test_images']:,} test images against {counts}. Parts of a set compare with no "
        "published figure. The compressed size takes images that compress well for the others.",
    ]
    for name, part in results["sets"].items():
        lines = []
        for kind in ("unsupervised", "supervised"):
            for score in results[kind]:
                found = part["scores"][score]
                lines.append(
                    (f"{score}, {kind}", *(found[key] for key in ("auroc", "aupr", "fpr")))
                )
        header = (f"{name}, N = {part['images']:,}", "AUROC", "AUPR", "FPR at 95% kept")
        text += ["", *rows(header, lines, percent)]
    for note in results["notes"]:
        text += ["", note]
    return "\n".join(text)


def draw(results: dict[str, Any], subject: Subject) -> dict[str, Figure]:
    """The likelihoods of each set; and every score's AUROC on it."""
    sets, scores = results["sets"], [*results["unsupervised"], *results["supervised"]]
    figure = Figure(figsize=(12, 0.36 * len(scores) + 2.2), layout="constrained")
    likelihoods, auroc = figure.subplots(1, 2, width_ratios=(1, 1.1))
    stored = results["nats_per_pixel"]
    for name, density in stored["density"].items():
        own = name == "test images"
        likelihoods.stairs(density, stored["edges"], label=name, fill=own, alpha=0.35 if own else 1)
    likelihoods.set(xlabel="nats per palette pixel", ylabel="density", yticks=[],
                    title="likelihood: to the left, the more likely")  # fmt: skip
    likelihoods.legend(frameon=False)
    likelihoods.spines[["top", "right"]].set_visible(False)

    values = np.array(
        [[100 * part["scores"][s]["auroc"] for part in sets.values()] for s in scores]
    )
    auroc.imshow(values, vmin=0, vmax=100, cmap="RdYlBu", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if abs(value - 50) > 35 else "black"
        auroc.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    auroc.set_yticks(range(len(scores)), scores)
    labels = [f"{name}\nN = {part['images']:,}" for name, part in sets.items()]
    auroc.set_xticks(range(len(sets)), labels)
    auroc.set(title=f"AUROC, %, against {results['test_images']:,} test images")
    auroc.axhline(len(results["unsupervised"]) - 0.5, color="black", linewidth=1)
    return {"ood": figure}


def detection(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """How well a score, [N] of familiar images and [M] of others, tells them apart."""
    scores = np.concatenate((inside, outside))
    other = np.repeat([0, 1], [len(inside), len(outside)])
    threshold = np.quantile(inside, KEPT, method="inverted_cdf")
    return {
        "auroc": float(roc_auc_score(other, scores)),
        "aupr": float(average_precision_score(other, scores)),
        "fpr": float((outside <= threshold).mean()),
    }


def unsupervised_scores(subject: Subject) -> dict[str, Score]:
    """By name; they follow from the network and the training images, not from labels.

    likelihood: -log p. typicality: |-log p - its mean on the training images| (Nalisnick et al.
    2019). compressed size: -bits as PNG; corrected: of Serrà et al. (2020). Mahalanobis distance:
    to one Gaussian of the encoding, squared (Lee et al. 2018 have one a class), its covariance
    shrunk (Ledoit and Wolf 2004). distance to neighbour k: Euclidean, of encodings at length 1
    (Sun et al. 2022).
    """
    features, run = subject.features, subject.run
    train = features.encoding(subject.train.images)  # [N, width]
    gaussian = LedoitWolf().fit(train)  # one Gaussian, its covariance shrunk
    neighbors = run.config.evaluation.neighbors
    expected = -features.log_prob(subject.train.images).mean()
    scores: dict[str, Score] = {
        "likelihood": lambda images: -features.log_prob(images),
        "typicality": lambda images: np.abs(-features.log_prob(images) - expected),
        "compressed size": lambda images: -compressed_bits(run, images),
        "likelihood corrected by size": lambda images: corrected(features, images),
        "Mahalanobis distance": lambda images: gaussian.mahalanobis(features.encoding(images)),
    }
    if neighbors <= len(train):
        nearest = NearestNeighbors(n_neighbors=neighbors).fit(unit(train))
        scores[_neighbor_score(subject)] = lambda images: nearest.kneighbors(
            unit(features.encoding(images))
        )[0][:, -1]
    return scores


def supervised_scores(subject: Subject) -> dict[str, Score]:
    """By name, of the linear probe and of what finetuning has left.

    softmax: -max of the probabilities (Hendrycks and Gimpel 2017). energy: -logsumexp of the logits
    (Liu et al. 2020).
    Raises NotMeasuredError where there are no labels.
    """
    choice = probe.choose(subject)
    classifier = probe.train_probe(subject, choice)
    logits: dict[str, Score] = {
        "probe": lambda images: probe.logits(
            classifier, subject.features.layer(images, choice.layer)
        )
    }
    for name, finetuned in finetuning.find(subject).items():
        features = subject.features_of(finetuned.run)
        logits[f"finetuned, {name}"] = lambda images, finetuned=finetuned, features=features: (  # type: ignore[misc]
            finetuned.logits(features.encoding(images))
        )
    scores: dict[str, Score] = {}
    for name, function in logits.items():
        scores[f"{name}: softmax"] = lambda i, function=function: -softmax(function(i)).max(1)  # type: ignore[misc]
        scores[f"{name}: energy"] = lambda i, function=function: -logsumexp(function(i), axis=1)  # type: ignore[misc]
    return scores


def corrected(features: Features, images: np.ndarray) -> np.ndarray:
    """-log2 p(image) less its compressed size in bits, [N] (Serrà et al. 2020)."""
    return -features.log_prob(images) / math.log(2) - compressed_bits(features.run, images)


def compressed_bits(run: Run, images: np.ndarray) -> np.ndarray:
    """The size in bits of each image as PNG, [N]: on the run's grid, in its palette."""
    return np.array([8 * _png_bytes(image) for image in run.quantize(images).numpy()], dtype=float)


def unit(features: np.ndarray) -> np.ndarray:
    """Features [N, D] at length 1, as nearest neighbours are compared (Sun et al. 2022)."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def read_images(subject: Subject, source: str) -> np.ndarray:
    """All images of an .npz file or folder on the run's grid, uint8 [N, H, W, 3]."""
    dataset = load_dataset(source, subject.run.config.model.grid)
    return np.concatenate((dataset.train.images, dataset.test.images))


def _png_bytes(image: np.ndarray) -> int:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", optimize=True)
    return content.tell()


def _histograms(nats: dict[str, np.ndarray]) -> dict[str, Any]:
    """On shared bins that cover all but the last thousandth of either side."""
    everything = np.concatenate(list(nats.values()))
    low, high = np.quantile(everything, (0.001, 0.999))
    edges = np.linspace(low, max(high, low + 1e-9), BINS + 1)
    inside = {name: np.clip(values, edges[0], edges[-1]) for name, values in nats.items()}
    return {
        "edges": edges.tolist(),
        "density": {
            name: np.histogram(values, edges, density=True)[0].tolist()
            for name, values in inside.items()
        },
        "mean": {name: float(values.mean()) for name, values in nats.items()},
    }
