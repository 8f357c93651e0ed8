"""The table and the figure that answer a study's question."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gcrl.checkpoint import replace_file
from gcrl.evaluation.markdown import number, rows
from gcrl.figures import BLUE, GREY, save
from gcrl.study.variants import VARIANTS
from gcrl.study.verdict import ACCURACY, AUROC, BITS, SCORE, read

SHOWN = (SCORE, "likelihood corrected by size", "Mahalanobis distance")  # scores in the table
COLUMNS = 3  # of the figure's panels
SIZE_ALONE = "compressed size"  # a score that takes no network
_NAMES = {ACCURACY: "probe accuracy", BITS: "bits per pixel", AUROC: f"AUROC of the {SCORE}"}


def write(folder: Path, results: dict[str, Any]) -> None:
    """study.json, study.md and study.png."""
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    replace_file(folder / "study.json", text.encode())
    replace_file(folder / "study.md", table(results).encode())
    save(figure(results), folder / "study.png")


def table(results: dict[str, Any]) -> str:
    """What every network can do, and whether the hybrid keeps it."""
    lines = [
        f"{headline(results)} Compute is counted on paper, time is of the training alone. "
        "Generative is the axial network's, not iGPT's full attention.",
        "",
        *networks(results),
    ]
    if results["sets"]:
        lines += ["", *_auroc_table(results, _present(results))]
    lines += ["", *verdicts(results)]
    return "\n".join(lines) + "\n"


def networks(results: dict[str, Any]) -> Iterator[str]:
    """Markdown lines: what each network can do, and what it cost."""
    header = ("network", "probe accuracy", "k-NN", "bits per pixel", "TFLOP", "minutes")
    yield from rows(header, [_line(results, variant) for variant in _present(results)], number)
    heads = _values(results, "labels", lambda found: found.get("head_accuracy"))
    if heads:
        yield ""
        yield f"The head that was trained with labels itself: {_percent(heads)}."


def headline(results: dict[str, Any]) -> str:
    """What the numbers are of."""
    optim, count = results["config"]["optim"], len(results["seeds"])
    images = optim["steps"] * optim["batch_size"] * optim["accumulate"]
    spread = f"{count} seeds, mean ± deviation over them" if count > 1 else "1 seed"
    measured = [n["test_images"] for seed in results["seeds"] for n in seed["networks"].values()]
    return (
        f"{results['dataset']}: {images:,} images seen by every trained network, {spread}; "
        f"measured on {max(measured, default=0):,} test images."
    )


def figure(results: dict[str, Any]) -> Figure:
    """A panel for each measure, a point for each network; the band is what counts as kept."""
    measures: list[tuple[str, str | None]] = [(ACCURACY, None), (BITS, None)]
    measures += [(AUROC, name) for name in results["sets"]]
    present = _present(results)
    columns = min(COLUMNS, len(measures))
    lines = -(-len(measures) // columns)
    size = (3 * columns + 2.5, (0.36 * len(present) + 1) * lines)
    drawn = Figure(figsize=size, layout="constrained")
    panels = drawn.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (measure, name) in zip(panels.flat, measures, strict=False):
        _panel(axes, results, present, measure, name)
    for axes in panels.flat[len(measures) :]:
        axes.set_axis_off()
    panels[0, 0].set_yticks(range(len(present)), [VARIANTS[v].title for v in present])
    panels[0, 0].set_ylim(len(present) - 0.5, -0.5)
    return drawn


def _panel(
    axes: Axes, results: dict[str, Any], present: list[str], measure: str, name: str | None
) -> None:
    factor = 1 if measure == BITS else 100
    for place, variant in enumerate(present):
        values = _values(results, variant, lambda found: read(found, measure, name))
        if not values:
            axes.text(0.02, place, "not measured" if measure == ACCURACY else "no decoder trained",
                      transform=axes.get_yaxis_transform(), va="center", color=GREY)  # fmt: skip
            continue
        mean, error = factor * np.mean(values), factor * _deviation(values)
        color = BLUE if variant == "hybrid" else GREY
        axes.errorbar(mean, place, xerr=error if len(values) > 1 else None, fmt="o", color=color)
        axes.annotate(f"{mean:.3f}" if measure == BITS else f"{mean:.1f}", (mean, place),
                      xytext=(0, 5), textcoords="offset points", ha="center")  # fmt: skip
    for verdict in results["verdicts"]:
        if (verdict["measure"], verdict["set"]) == (measure, name):
            other = _values(results, verdict["against"], lambda found: read(found, measure, name))
            kept, allowed = factor * float(np.mean(other)), factor * verdict["allowed"]
            band = (kept, kept + allowed) if measure == BITS else (kept - allowed, kept)
            axes.axvspan(*band, color="#e9a23b", alpha=0.5, linewidth=0)
    unit = "" if measure == BITS else ", %"
    on_set = f"\non {_sized(results, name)}" if name else ""
    axes.set_title(f"{_NAMES[measure]}{unit}{on_set}", fontsize=10)
    axes.margins(x=0.18)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def verdicts(results: dict[str, Any]) -> Iterator[str]:
    """Markdown lines: what the hybrid keeps, and by which rule."""
    if not results["verdicts"]:
        yield "No verdict yet: it takes the hybrid and what it is compared with."
        return
    yield (
        "Decided beforehand: the hybrid keeps a measure if it falls short by no more than 1.0 "
        "point of probe accuracy, 0.03 bits per pixel or 0.02 AUROC, or than two standard errors "
        "of the difference over the seeds."
    )
    yield ""
    for verdict in results["verdicts"]:
        name, bits = _NAMES[verdict["measure"]], verdict["measure"] == BITS
        on_set = f" on {_sized(results, verdict['set'])}," if verdict["set"] else ""
        short, allowed = (
            f"{value:.3f}" if bits else f"{100 * value:.1f} points"
            for value in (abs(verdict["short"]), verdict["allowed"])
        )
        by = f"ahead by {short}" if verdict["short"] < 0 else f"short by {short}, {allowed} allowed"
        kept = "keeps" if verdict["keeps"] else "does not keep"
        title = f"{name}{on_set} of '{VARIANTS[verdict['against']].title}'"
        yield f"- The hybrid {kept} the {title}: {by}."
    blind = [name for name in results["sets"] if _below_chance(results, name)]
    if blind:
        yield ""
        yield (
            f"Neither network's likelihood tells {', '.join(blind)} from the test images (AUROC "
            "below 50%): what is kept there is a failure of both."
        )


def _below_chance(results: dict[str, Any], name: str) -> bool:
    """Whether both the hybrid and the generative network find the set likelier than the tests."""
    values = [
        _values(results, variant, lambda found: read(found, AUROC, name))
        for variant in ("hybrid", "generative")
    ]
    return all(found and np.mean(found) < 0.5 for found in values)


def _line(results: dict[str, Any], variant: str) -> tuple[str | None, ...]:
    return (VARIANTS[variant].title, *_cells(results, variant))


def _cells(results: dict[str, Any], variant: str) -> Iterator[str | None]:
    yield _percent(_values(results, variant, lambda found: found.get(ACCURACY)))
    yield _percent(_values(results, variant, lambda found: found.get("knn")))
    yield _spread(_values(results, variant, lambda found: found.get(BITS)), "{:.3f}")
    flops = _values(results, variant, lambda found: found["training_flops"])[:1]
    yield _spread([count / 1e12 for count in flops], "{:,.3g}")
    seconds = _values(results, variant, lambda found: found["seconds"])
    yield _spread([value / 60 for value in seconds], "{:.1f}")


def _auroc_table(results: dict[str, Any], present: list[str]) -> Iterator[str]:
    """A line for every score of every network that has it; that of no network comes last."""
    lines = []
    for score in (*SHOWN, SIZE_ALONE):
        for variant in present[:1] if score == SIZE_ALONE else present:
            cells = [
                _percent(_values(results, variant, partial(_auroc, name=name, score=score)))
                for name in results["sets"]
            ]
            if any(cells):
                owner = "none" if score == SIZE_ALONE else VARIANTS[variant].title
                lines.append((score, owner, *cells))
    yield (
        "Telling other images from the test images, without labels: AUROC, the other images as "
        "the positive class."
    )
    yield ""
    titles = [_sized(results, name) for name in results["sets"]]
    yield from rows(("score", "network", *titles), lines, number)


def _auroc(found: dict[str, Any], name: str, score: str) -> float | None:
    value: float | None = found[AUROC].get(name, {}).get(score)
    return value


def _sized(results: dict[str, Any], name: str) -> str:
    return f"{name}, N = {results['set_sizes'][name]:,}"


def _present(results: dict[str, Any]) -> list[str]:
    return [v for v in VARIANTS if any(v in seed["networks"] for seed in results["seeds"])]


def _values(results: dict[str, Any], variant: str, value: Any) -> list[float]:
    """Over the seeds, where it has been measured."""
    networks = [seed["networks"] for seed in results["seeds"] if variant in seed["networks"]]
    return [found for found in (value(n[variant]) for n in networks) if found is not None]


def _percent(values: list[float]) -> str | None:
    text = _spread([100 * value for value in values], "{:.1f}")
    return text and f"{text}%"


def _spread(values: list[float], form: str) -> str | None:
    if not values:
        return None
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(_deviation(values))}"


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
