"""How likely the test images are: nats and bits per palette pixel, image by image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gcrl.config import ObjectiveConfig
from gcrl.evaluation.markdown import number, rows
from gcrl.evaluation.subject import Subject
from gcrl.figures import BLUE, GREY, rows_figure

BINS = 50
SHOWN = 8  # of the most and of the least likely images


def inputs(subject: Subject) -> dict[str, Any]:
    return {}


def measure(subject: Subject) -> dict[str, Any]:
    """Over all pixels, the first included; the deviation is that between images."""
    height, width = subject.run.config.model.grid
    pixels = height * width
    nats = -subject.features.log_prob(subject.test.images) / pixels  # [N]
    counts, edges = np.histogram(nats, BINS)
    order = np.argsort(nats, kind="stable")
    uniform = math.log(subject.run.config.model.colors)
    deviation = float(nats.std(ddof=1)) if len(nats) > 1 else 0.0
    return {
        "test_images": len(nats),
        "pixels": pixels,
        "nats_per_pixel": float(nats.mean()),
        "bits_per_pixel": float(nats.mean() / math.log(2)),
        "deviation": deviation,
        "standard_error": deviation / math.sqrt(len(nats)),
        "uniform_nats_per_pixel": uniform,
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "most_likely": _described(order[:SHOWN], nats),
        "least_likely": _described(order[::-1][:SHOWN], nats),
        "notes": notes_on(subject.run.config.objective),
    }


def notes_on(objective: ObjectiveConfig) -> list[str]:
    """What is to be known of a likelihood that was trained by it."""
    if objective.alpha == 0:
        return ["alpha is 0: the decoder was not trained, and the likelihood shows it."]
    if not objective.score_first_pixel:
        return ["The first pixel was not trained, but its likelihood is counted here."]
    return []


def table(results: dict[str, Any]) -> str:
    scales = (("nats", 1.0), ("bits", math.log(2)))
    names = (
        "nats_per_pixel",
        "standard_error",
        "deviation",
        "uniform_nats_per_pixel",
    )
    lines = [(f"{unit} per pixel", *(results[name] / by for name in names)) for unit, by in scales]
    header = ("", "mean", "standard error", "deviation", "uniform guess")
    count = f"{results['test_images']:,} test images, {results['pixels']:,} palette pixels each."
    notes = [line for note in results["notes"] for line in ("", note)]
    return "\n".join([count, "", *rows(header, lines, number), *notes])


def draw(results: dict[str, Any], subject: Subject) -> dict[str, Figure]:
    """The histogram; and the most and the least likely images."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    histogram = results["histogram"]
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=BLUE, alpha=0.7)
    axes.axvline(results["nats_per_pixel"], color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"mean {results['nats_per_pixel']:.3f} nats = {results['bits_per_pixel']:.3f} bits",
        (results["nats_per_pixel"], 1), xycoords=("data", "axes fraction"),
        xytext=(4, -12), textcoords="offset points",
    )  # fmt: skip
    bits = axes.secondary_xaxis("top", functions=(_to_bits, _to_nats))
    bits.set_xlabel("bits per palette pixel")
    axes.set(xlabel="nats per palette pixel", ylabel="test images")
    images = subject.run.quantize(subject.test.images).numpy()
    extremes = {
        name: images[[entry["image"] for entry in results[key]]]
        for name, key in (("most likely", "most_likely"), ("least likely", "least_likely"))
    }
    return {"likelihood": figure, "likelihood-extremes": rows_figure(extremes)}


def _to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _to_nats(bits: Any) -> Any:
    return bits * math.log(2)


def _described(chosen: np.ndarray, nats: np.ndarray) -> list[dict[str, Any]]:
    return [{"image": int(index), "nats_per_pixel": float(nats[index])} for index in chosen]
