"""The pictures that a run leaves, read back from their files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from PIL import Image

from gcrl import figures
from gcrl.config import Config
from gcrl.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run.tiny_run(tmp_path_factory.mktemp("run"))


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def write_metrics(folder: Path, count: int = 40, config: Config = tiny_run.CONFIG) -> None:
    (folder / "config.json").write_text(config.to_json())
    rng = np.random.default_rng(0)
    records = [
        {
            "step": 10 * (i + 1),
            "images": 80 * (i + 1),
            "nats_per_pixel": 1 + math.exp(-i / 10) + 0.05 * rng.standard_normal(),
            "contrastive": None if config.objective.beta == 0 else 2 - i / count,
        }
        for i in range(count)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)


def contains(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether the part lies somewhere in the picture, dot for dot."""
    height, width = part.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(picture, (height, width, 3))
    candidates = (windows[:, :, 0, 0, 0] == part[0, 0]).all(-1)
    return any(np.array_equal(window, part) for window in windows[candidates][:, 0])


def test_images_are_saved_dot_for_dot(tmp_path: Path) -> None:
    images = tiny_run.noise_images(5)
    picture = read(figures.save_images(tmp_path / "images.png", images))
    assert picture.shape == (
        2 * 172 + 4,
        3 * 172 + 8,
        3,
    )  # in threes, a pixel 43 dots
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        tile = picture[176 * row :, 176 * column :][:172, :172]
        assert np.array_equal(tile, image.repeat(43, axis=0).repeat(43, axis=1))
    assert (picture[176:, 352:] == 255).all()


@pytest.mark.parametrize("count", [1, 2, 40])
def test_curves_are_drawn(tmp_path: Path, count: int) -> None:
    write_metrics(tmp_path, count)
    picture = read(figures.draw_curves(tmp_path))
    assert figures.draw_curves(tmp_path) == tmp_path / "curves.png"
    assert picture.shape == (400, 1000, 3)
    for panel in (picture[:, :500], picture[:, 500:]):
        blue = (panel == (0x1F, 0x6F, 0xB4)).all(-1)  # the curve
        assert blue.sum() > 10


def test_a_part_that_was_not_trained_has_no_curve(tmp_path: Path) -> None:
    write_metrics(tmp_path, config=tiny_run.with_settings("objective", beta=0.0))
    picture = read(figures.draw_curves(tmp_path))
    blue = (picture == (0x1F, 0x6F, 0xB4)).all(-1)
    grey = (picture == 0x8A).all(-1)  # what it would start from
    assert blue[:, :600].any()  # wider than the second panel, which has no numbers
    assert grey[:, :600].sum(1).max() > 100
    assert not blue[:, 600:].any()
    assert grey[:, 600:].sum(1).max() < 20


@pytest.mark.parametrize("content", [None, ""])
def test_curves_of_nothing_are_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text(tiny_run.CONFIG.to_json())
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected at least one record"):
        figures.draw_curves(tmp_path)


def test_the_batch_is_that_of_all_processes() -> None:
    record = {"step": 10, "images": 10 * 4 * 3 * 2}  # 4 images, 3 parts a step, 2 processes
    config = tiny_run.with_settings("optim", accumulate=3)
    assert figures._global_batch(record, config) == 8


def test_smoothing_is_a_mean_that_never_reaches_beyond_the_curve() -> None:
    line = np.arange(100.0)
    assert np.allclose(figures._smoothed(line)[:95], line[:95])
    assert figures._smoothed(line)[-1] == pytest.approx(96.5)  # the mean of 94..99
    assert figures._smoothed(np.array([2.0, 7.0])).tolist() == [2.0, 7.0]
    jagged = np.tile([0.0, 1.0], 100)
    assert np.abs(figures._smoothed(jagged)[20:-20] - 0.5).max() < 0.05


def test_samples_stand_beside_real_images(run: Run) -> None:
    dataset = tiny_run.color_classes()
    picture = read(figures.draw_samples(run, dataset))
    generated = run.sample(6, seed=0).numpy()
    real = figures._test_images(run, dataset, 6)
    assert not np.array_equal(real, run.quantize(dataset.test.images[:6]).numpy())  # a mixed choice
    assert len(np.unique(real, axis=0)) > 1
    middle = picture.shape[1] // 2
    for images, half in ((generated, picture[:, :middle]), (real, picture[:, middle:])):
        assert contains(half, figures._tiled(images, 3))


def test_fewer_test_images_than_samples(run: Run) -> None:
    picture = read(figures.draw_samples(run, tiny_run.color_classes(3)))
    assert contains(picture, figures._tiled(run.sample(6, seed=0).numpy(), 3))


def test_completions_keep_what_is_given(run: Run) -> None:
    dataset = tiny_run.color_classes()
    picture = read(figures.draw_completions(run, dataset, count=3, draws=2))
    real = figures._test_images(run, dataset, 3)
    drawn = [run.complete(real, seed=draw).numpy() for draw in range(2)]
    assert not np.array_equal(*drawn)
    given = real.copy()
    given[:, 2:] = 225
    for images in (real, given, *drawn):
        assert contains(picture, figures._tiled(images, 3, 768))


def test_a_run_without_a_folder_has_nowhere_to_draw(run: Run) -> None:
    homeless = Run(run.config, run.model, run.palette)
    with pytest.raises(ValueError, match="run: expected one that was loaded from a folder"):
        figures.draw_samples(homeless, tiny_run.color_classes())
