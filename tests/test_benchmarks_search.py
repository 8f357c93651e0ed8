"""The search for hyper-parameters: its order, its score, and that the preset has what it found."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import search
from gcrl.data import load_dataset
from gcrl.study.compute import training_flops


def results(scores: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Of every trial that may come; those without a score do worse than any."""
    bad = {"score": -1000.0, "probe_accuracy": 0.3}
    return defaultdict(lambda: bad, {k: {**bad, "score": v} for k, v in scores.items()})


def names(scores: dict[str, float]) -> list[str]:
    return [trial.name for trial in search.trials(results(scores))]


def test_a_search_has_at_least_twelve_trials_of_different_names() -> None:
    found = names({})
    assert len(found) == len(set(found)) >= 12
    assert found[0] == "start"


def test_each_round_starts_from_the_best_before_it() -> None:
    scores = {"start": 1.0, "1: learning_rate 0.001": 2.0, "3: temperature 0.1": 2.5}
    done = results(scores | {"4: outer_layers 6, inner_layers 2": 9.0})
    done["1: learning_rate 0.001"]["probe_accuracy"] = 0.4
    found = {trial.name: trial.changed for trial in search.trials(done)}
    assert found["1: learning_rate 0.004"] == {**search.START, "learning_rate": 4e-3}
    assert found["2: beta 3"] == {**search.START, "learning_rate": 1e-3, "beta": 3.0}
    assert found["3: temperature 1"]["beta"] == search.START["beta"]
    layers = found["4: outer_layers 2, inner_layers 4"]
    assert (layers["learning_rate"], layers["temperature"]) == (1e-3, 0.1)
    # the last is tried on the one that keeps the accuracy
    assert found["5: learning_rate 0.008"] == {**search.START, "learning_rate": 8e-3}


def test_the_choice_keeps_the_accuracy() -> None:
    accuracy, score = (0.40, 0.391, 0.389), (1.0, 2.0, 3.0)
    entries = [{"probe_accuracy": a, "score": s} for a, s in zip(accuracy, score, strict=True)]
    assert search.choose(entries) is entries[1]
    assert search.choose(entries[2:]) is entries[2]


def test_trials_have_the_same_compute() -> None:
    for trial in search.trials(results({})):
        config = trial.config(Path("images.npz")).validate()
        flops = training_flops(config.model, 2, generates=True) * config.optim.steps
        start = training_flops(search.Trial("start", search.START).config(Path("x")).model, 2,
                               generates=True) * search.STEPS  # fmt: skip
        assert flops == pytest.approx(start, rel=0.01)
        values = config.flat()
        assert {key: values[key] for key in trial.changed} == trial.changed


def test_a_point_of_accuracy_is_worth_three_hundredths_of_a_bit() -> None:
    assert search.score(0.41, 5.03) == pytest.approx(search.score(0.40, 5.0))
    assert search.score(0.41, 5.0) > search.score(0.40, 5.0) > search.score(0.40, 5.1)


def test_the_images_held_out_are_training_images(tmp_path: Path) -> None:
    numbers = np.arange(6000)
    colors = np.stack((numbers // 256, numbers % 256, numbers * 0), 1).astype(np.uint8)
    images = np.tile(colors[:, None, None], (1, 32, 32, 1))
    labels = np.arange(6000) % 10
    test = np.full((10, 32, 32, 3), 255, np.uint8)
    np.savez(tmp_path / "all.npz", images=images, labels=labels, test_images=test,
             test_labels=labels[:10])  # fmt: skip
    search.hold_out(str(tmp_path / "all.npz"), tmp_path / "search" / "held.npz")
    found = load_dataset(str(tmp_path / "search" / "held.npz"), (2, 2))
    assert (len(found.train), len(found.test)) == (1000, 5000)
    both = np.concatenate((found.train.images, found.test.images))[:, 0, 0].astype(int)
    assert sorted(both[:, 0] * 256 + both[:, 1]) == numbers.tolist()
    assert found.test.labels is not None
    assert (np.bincount(found.test.labels) == 500).all()


def recorded() -> dict[str, Any]:
    if not search.RESULTS.exists():
        pytest.skip("the results are not in this checkout")
    content: dict[str, Any] = json.loads(search.RESULTS.read_text())
    return content


def test_the_recorded_search_followed_its_own_rules() -> None:
    done = {entry["trial"]: entry for entry in recorded()["trials"]}
    for entry in done.values():
        assert entry["score"] == search.score(entry["probe_accuracy"], entry["bits_per_pixel"])
    planned = list(search.trials(done))
    assert [trial.name for trial in planned] == list(done)
    for trial in planned:
        assert trial.changed == {key: done[trial.name][key] for key in trial.changed}


def test_the_preset_has_what_the_search_found() -> None:
    chosen = search.choose(recorded()["trials"])
    assert chosen["trial"] == recorded()["chosen"]
    values = search.preset("cifar10-small").flat()
    assert {key: chosen[key] for key in search.START} == {key: values[key] for key in search.START}
