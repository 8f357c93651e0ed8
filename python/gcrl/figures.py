"""The pictures of a run: its losses, and its images beside real ones."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gcrl import metrics
from gcrl.checkpoint import replace_file
from gcrl.config import Config, ConfigError
from gcrl.data import Dataset
from gcrl.run import Run

_DOTS = 100  # per inch
_GAP, _MARGIN = 4, 20  # dots
BLUE, GREY = "#1f6fb4", "#8a8a8a"


def draw_curves(folder: str | Path) -> Path:
    """Draw both losses over the steps, from metrics.jsonl to curves.png in the run's folder.

    Beside them what they start from: ln K nats per pixel for a uniform guess among K colours, and
    ln(2N - 1) for one among the other views of a batch of N images.
    Raises ValueError where nothing has been recorded yet.
    """
    folder = Path(folder)
    config = Config.load(folder / "config.json")
    path = folder / metrics.FILE
    records = metrics.read(path, "images")
    if not records:
        raise ConfigError(f"{path}: expected at least one record of the training, found none")
    colors, batch = config.model.colors, _global_batch(records[-1], config)
    figure = Figure(figsize=(10, 4), layout="constrained")
    pixels, views = figure.subplots(1, 2)
    _draw_loss(
        pixels, records, "nats_per_pixel", math.log(colors), f"ln {colors}", config.objective.alpha
    )
    pixels.set(title="generative loss", ylabel="nats per pixel")
    _draw_loss(
        views, records, "contrastive", math.log(2 * batch - 1), f"ln {2 * batch - 1}",
        config.objective.beta,
    )  # fmt: skip
    views.set(title=f"contrastive loss, {batch} pairs", ylabel="NT-Xent")
    return save(figure, folder / "curves.png")


def draw_samples(run: Run, dataset: Dataset) -> Path:
    """Draw generated images beside real test images, to samples.png in the run's folder."""
    return save(sample_figure(run, dataset), _folder(run) / "samples.png")


def draw_completions(run: Run, dataset: Dataset, *, count: int = 8, draws: int = 3) -> Path:
    """Draw test images with their lower halves drawn anew, to completions.png in the folder."""
    figure = completion_figure(run, dataset, count=count, draws=draws)
    return save(figure, _folder(run) / "completions.png")


def sample_figure(run: Run, dataset: Dataset) -> Figure:
    """Generated images beside real test images, both as many as the run's sample_count."""
    count = run.config.evaluation.sample_count
    generated = run.sample(count, seed=run.config.runtime.seed).numpy()
    panels = {
        f"generated, step {run.step:,}": generated,
        f"real, in {run.config.model.colors} colours": _test_images(run, dataset, count),
    }
    pictures = [(name, _tiled(part, _square(count))) for name, part in panels.items()]
    return _side_by_side(pictures)


def completion_figure(run: Run, dataset: Dataset, *, count: int = 8, draws: int = 3) -> Figure:
    """Test images with their lower halves drawn anew."""
    real = _test_images(run, dataset, count)
    given = real.copy()
    given[:, run.kept_rows :] = 225
    rows = {"real": real, "given": given}
    for draw in range(draws):
        completed = run.complete(real, seed=run.config.runtime.seed + draw)
        rows[f"completed {draw + 1}"] = completed.numpy()
    return rows_figure(rows)


def rows_figure(rows: dict[str, np.ndarray]) -> Figure:
    """Named rows of images, uint8 [N, H, W, 3] each, one below the other."""
    return _stacked([(name, _tiled(part, len(part), 768)) for name, part in rows.items()])


def save_images(path: str | Path, images: np.ndarray | Tensor) -> Path:
    """Write images, uint8 [N, H, W, 3], as one .png: side by side in a square, pixels enlarged."""
    return save(_figure(_tiled(np.asarray(images), _square(len(images)))), Path(path))


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as .png: whole, or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=figure.dpi)
    replace_file(path, content.getvalue())
    return path


def _global_batch(record: dict[str, Any], config: Config) -> int:
    """Images that NT-Xent compares at once, over all processes."""
    return round(record["images"] / record["step"] / config.optim.accumulate)


def _draw_loss(
    axes: Axes,
    records: Sequence[dict[str, Any]],
    key: str,
    chance: float,
    chance_name: str,
    weight: float,
) -> None:
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    if weight == 0:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not trained: its weight is 0", ha="center", transform=axes.transAxes)
        return
    steps = np.array([record["step"] for record in records])
    values = np.array([record[key] for record in records], dtype=float)
    smooth = _smoothed(values)
    marker = "o" if len(steps) == 1 else None
    axes.axhline(chance, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"{chance_name} = {chance:.2f}", (1, chance), xycoords=("axes fraction", "data"),
        xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", color=GREY,
    )  # fmt: skip
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth, color=BLUE, linewidth=1.8, marker=marker)
    axes.annotate(
        f"{smooth[-1]:.2f}", (steps[-1], smooth[-1]),
        xytext=(5, 0), textcoords="offset points", va="center", color=BLUE,
    )  # fmt: skip
    axes.grid(axis="y", alpha=0.25)
    axes.margins(y=0.12)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean around each value, 1/20 of all to either side; less where the curve begins."""
    reach = [min(index, len(values) // 20) for index in range(len(values))]
    return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def _test_images(run: Run, dataset: Dataset, count: int) -> np.ndarray:
    """Test images chosen by the run's seed, in palette colours, uint8 [at most count, H, W, 3]."""
    order = np.random.default_rng(run.config.runtime.seed).permutation(len(dataset.test))
    return run.quantize(dataset.test.images[order[:count]]).numpy()


def _tiled(images: np.ndarray, columns: int, dots: int = 512) -> np.ndarray:
    """Images uint8 [N, H, W, 3] in rows of so many, enlarged to about so many dots a row."""
    scale = max(1, round(max(dots / columns, 48) / max(images.shape[1:3])))
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = large.shape[1] + _GAP, large.shape[2] + _GAP
    tiles = np.full((-(-len(large) // columns) * height, columns * width, 3), 255, dtype=np.uint8)
    for index, image in enumerate(large):
        row, column = divmod(index, columns)
        tiles[row * height :, column * width :][: height - _GAP, : width - _GAP] = image
    return tiles[:-_GAP, :-_GAP]


def _square(count: int) -> int:
    """Columns of the squarest arrangement."""
    return math.ceil(math.sqrt(count))


def _side_by_side(panels: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Named pictures, uint8 [h, w, 3], from left to right, their names above them."""
    width = sum(picture.shape[1] + _MARGIN for _, picture in panels) + _MARGIN
    height = max(picture.shape[0] for _, picture in panels) + 3 * _MARGIN
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    left, names = _MARGIN, []
    for name, picture in panels:
        canvas[2 * _MARGIN :, left:][: picture.shape[0], : picture.shape[1]] = picture
        names.append((left, int(1.6 * _MARGIN), name))
        left += picture.shape[1] + _MARGIN
    return _figure(canvas, names)


def _stacked(rows: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Named pictures, uint8 [h, w, 3], one below the other, their names at the left."""
    label = 110
    width = max(picture.shape[1] for _, picture in rows) + 2 * _MARGIN + label
    height = sum(picture.shape[0] + _GAP for _, picture in rows) + 2 * _MARGIN
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    top, names = _MARGIN, []
    for name, picture in rows:
        canvas[top:, _MARGIN + label :][: picture.shape[0], : picture.shape[1]] = picture
        names.append((_MARGIN, top + picture.shape[0] // 2 + 5, name))
        top += picture.shape[0] + _GAP
    return _figure(canvas, names)


def _figure(canvas: np.ndarray, texts: Sequence[tuple[int, int, str]] = ()) -> Figure:
    """A picture, uint8 [h, w, 3], dot for dot, with texts at (x, baseline y) from the top left."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / _DOTS, height / _DOTS), dpi=_DOTS)
    figure.figimage(canvas, origin="upper")
    for x, y, text in texts:
        figure.text(x / width, 1 - y / height, text, fontsize=11)
    return figure


def _folder(run: Run) -> Path:
    if run.folder is None:
        raise ValueError("run: expected one that was loaded from a folder, to draw into it")
    return run.folder
