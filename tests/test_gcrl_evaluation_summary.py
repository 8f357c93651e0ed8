"""What is measured when training ends, checked on cases whose answer is known."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from gcrl import probes
from gcrl.data import Dataset, ImageSet
from gcrl.evaluation.summary import contrastive, evaluate, likelihood, table, write_results
from gcrl.palette import to_tokens
from gcrl.run import Run
from gcrl.views import make_views


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run.tiny_run(tmp_path_factory.mktemp("run"))


def clusters(count: int, seed: int, spread: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Four classes at the corners of a square, in 6 dimensions of very unequal scale."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    features = spread * rng.standard_normal((count, 6))
    features[:, 0] += labels % 2
    features[:, 1] += labels // 2
    return (features * [1, 1e-3, 1, 1, 1, 1e3]).astype(np.float32), labels


def test_a_linear_probe_reads_separable_features() -> None:
    probe = probes.linear_probe(*clusters(200, 0), *clusters(100, 1))
    assert probe.accuracy == 1.0
    assert probe.calibration_error < 0.1


def test_random_labels_give_chance() -> None:
    train, test = clusters(400, 0)[0], clusters(1000, 1)[0]
    rng = np.random.default_rng(2)
    train_labels, test_labels = rng.integers(0, 4, 400), rng.integers(0, 4, 1000)
    probe = probes.linear_probe(train, train_labels, test, test_labels)
    assert abs(probe.accuracy - 0.25) < 0.06  # 4 standard errors
    neighbors = probes.nearest_neighbors(train, train_labels, test, test_labels, 5)
    assert abs(neighbors - 0.25) < 0.06


def noisy(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that differ a little in some of 300 dimensions."""
    labels = np.arange(200) % 2
    features = np.random.default_rng(seed).standard_normal((200, 300))
    features[:, :20] += 0.4 * labels[:, None]
    return features, labels


def clean(seed: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(200) % 2
    noise = 0.01 * np.random.default_rng(seed).standard_normal((200, 300))
    return labels[:, None] + noise, labels


def test_noisy_features_get_a_strongly_regularised_probe() -> None:
    assert probes.linear_probe(*noisy(0), *noisy(1)).strength <= 0.01
    assert probes.linear_probe(*clean(0), *clean(1)).strength == 1.0


def test_the_test_images_have_no_say_in_the_probes_strength() -> None:
    assert probes.linear_probe(*noisy(0), *clean(1)).strength <= 0.01
    assert probes.linear_probe(*clean(0), *noisy(1)).strength == 1.0


def test_a_fifth_of_every_class_is_held_out() -> None:
    labels = np.repeat([0, 1, 2], [50, 25, 5])
    held = probes._held_out(labels, seed=0)
    assert [int(held[labels == label].sum()) for label in range(3)] == [10, 5, 1]
    assert not np.array_equal(held, probes._held_out(labels, seed=1))


@pytest.mark.parametrize("count", [2, 4])
def test_a_probe_of_few_samples(count: int) -> None:
    features, labels = clean(0)
    probe = probes.linear_probe(features[:count], labels[:count], *clean(1))
    assert probe.accuracy == 1.0
    assert probe.strength == probes.STRENGTHS[0]


def test_a_class_that_the_probe_never_saw_counts_as_wrong() -> None:
    features, labels = clusters(200, 0)
    test, test_labels = clusters(100, 1)
    unseen = np.where(test_labels == 0, 7, test_labels)
    probe = probes.linear_probe(features, labels, test, unseen)
    assert probe.accuracy == np.mean(test_labels != 0)
    assert probe.calibration_error == pytest.approx(np.mean(test_labels == 0), abs=0.1)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.8] * 5 + [0.55] * 5)
    correct = np.array([1, 1, 1, 0, 0, 1, 1, 1, 1, 1], dtype=bool)
    # |0.8 - 0.6| and |0.55 - 1|, each for half of the images
    error = probes.calibration_error(confidence, correct)
    assert error == pytest.approx((0.2 + 0.45) / 2, abs=1e-6)
    # A confidence of 1 is in the bin of 0.96: |0.98 - 0.5|, not |0.96 - 1| and |1 - 0|.
    error = probes.calibration_error(np.array([0.96, 1.0]), np.array([True, False]))
    assert error == pytest.approx(0.48, abs=1e-6)


def test_nearest_neighbours_by_hand() -> None:
    # mean 0 and equal deviations: standardising changes no angle
    train = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [5, 5], [-5, -5]], dtype=np.float32)
    labels = np.array([0, 1, 2, 3, 4, 5])
    test = np.array([[6.0, 2.0], [-0.1, -9.0]])
    # by angle the first is next to (1, 0), by distance to (5, 5)
    assert probes.nearest_neighbors(train, labels, test, np.array([0, 3]), 1) == 1.0
    assert probes.nearest_neighbors(train, labels, test, np.array([4, 3]), 1) == 0.5
    votes = np.array([0, 1, 1, 0, 1, 0])  # of the nearest three, (1,0), (5,5), (0,1): 0, 1, 1
    assert probes.nearest_neighbors(train, votes, test[:1], np.array([1]), 3) == 1.0
    assert probes.nearest_neighbors(train, votes, test[:1], np.array([1]), 1) == 0.0


@pytest.mark.parametrize("neighbors", [0, 7])
def test_more_neighbours_than_images_are_refused(neighbors: int) -> None:
    train, labels = clusters(6, 0)
    with pytest.raises(ValueError, match=f"neighbors: expected 1 to 6, got {neighbors}"):
        probes.nearest_neighbors(train, labels, train, labels, neighbors)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 2])
def test_features_that_are_not_finite_are_refused(value: float, part: int) -> None:
    sets = [*clusters(50, 0), *clusters(20, 1)]
    sets[part][3, 2] = value
    message = f"features: 1 of {len(sets[part])} images have NaN"
    with pytest.raises(ValueError, match=message):
        probes.linear_probe(*sets)
    with pytest.raises(ValueError, match=message):
        probes.nearest_neighbors(*sets, 5)


def test_likelihood_in_all_its_units(run: Run) -> None:
    images = tiny_run.noise_images(9)
    result = likelihood(run, images)
    assert result["nats_per_image"] == pytest.approx(-run.log_prob(images).mean().item(), rel=1e-6)
    assert result["nats_per_pixel"] == pytest.approx(result["nats_per_image"] / 16)
    assert result["bits_per_pixel"] == pytest.approx(result["nats_per_pixel"] / math.log(2))
    assert result["uniform_nats_per_pixel"] == pytest.approx(math.log(8))


def test_a_model_that_knows_nothing_needs_ln_k_nats(run: Run) -> None:
    blank = replace(run, model=run.untrained().model)
    torch.nn.init.zeros_(blank.model.head.weight)
    result = likelihood(blank, tiny_run.noise_images(9))
    assert result["nats_per_pixel"] == pytest.approx(math.log(8), rel=1e-5)


@pytest.mark.parametrize(("count", "pairs"), [(11, 4), (3, 3)])
def test_the_contrastive_loss_is_that_of_batches_of_views(run: Run, count: int, pairs: int) -> None:
    images = tiny_run.noise_images(count)
    torch.manual_seed(99)  # which makes no difference
    before = torch.get_rng_state()
    result = contrastive(run, images)
    assert torch.equal(torch.get_rng_state(), before)
    assert result == contrastive(run, images)
    assert result["pairs"] == pairs
    assert result["chance"] == pytest.approx(math.log(2 * pairs - 1))

    losses = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(run.config.runtime.seed)
        for start in range(0, count - pairs + 1, pairs):
            batch = torch.from_numpy(images[start : start + pairs])
            views = make_views(batch, run.config.views)
            tokens = torch.cat([to_tokens(view, run.palette) for view in views])
            z = run.model.project(run.model.features(tokens))
            s = torch.cosine_similarity(z[:, None], z[None], dim=-1) / 0.2  # the temperature
            s.fill_diagonal_(-torch.inf)
            partner = torch.arange(2 * pairs).roll(pairs)
            losses.append(torch.nn.functional.cross_entropy(s, partner).item())
    assert result["nt_xent"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_outputs_that_are_not_finite_stop_the_evaluation(run: Run) -> None:
    broken = replace(run, model=run.untrained().model)
    torch.nn.init.constant_(broken.model.head.bias, math.nan)
    with pytest.raises(ValueError, match="log-probability on test images is nan"):
        evaluate(broken, tiny_run.color_classes(), progress=False)


@pytest.fixture(scope="module")
def results(run: Run) -> dict:
    return evaluate(run, tiny_run.color_classes(), progress=False)


def test_an_evaluation_compares_encoding_untrained_network_and_raw_pixels(results: dict) -> None:
    assert results["notes"] == []
    assert (results["step"], results["seed"]) == (30, 0)
    assert (results["test_images"], results["train_images"]) == (20, 40)  # of 60 and 60
    assert set(results["accuracy"]) == {"run", "untrained", "raw_pixels"}
    assert results["accuracy"]["raw_pixels"]["linear_probe"] == 1.0
    assert results["accuracy"]["raw_pixels"]["knn"] == 1.0
    for measured in results["accuracy"].values():
        assert 0.5 < measured["linear_probe"] <= 1  # the colour shows in every feature
        assert measured["neighbors"] == 3


def test_the_same_images_are_chosen_for_all_and_by_the_seed(
    run: Run, results: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def remember(train, train_labels, test, test_labels, **_):
        read.append((len(train), train_labels.tolist(), len(test), test_labels.tolist()))
        return probes.Probe(0.0, 0.0, 1.0)

    monkeypatch.setattr("gcrl.evaluation.summary.linear_probe", remember)
    evaluate(run, tiny_run.color_classes(), progress=False)
    assert len(read) == 3
    assert read[0] == read[1] == read[2]
    evaluate(
        replace(run, config=tiny_run.with_settings("runtime", seed=5)),
        tiny_run.color_classes(),
        progress=False,
    )
    assert read[3] != read[0]


def test_an_evaluation_repeats(run: Run, results: dict) -> None:
    assert evaluate(run, tiny_run.color_classes(), progress=False) == results


@pytest.mark.parametrize("where", ["train", "test"])
def test_without_labels_only_the_losses_are_measured(run: Run, where: str) -> None:
    dataset = tiny_run.color_classes()
    bare = ImageSet(getattr(dataset, where).images, None)
    results = evaluate(run, replace(dataset, **{where: bare}), progress=False)
    assert results["notes"] == ["No linear probe and no k-NN: the images have no labels."]
    assert "accuracy" not in results
    assert "no labels" in table(results)
    assert "nats per pixel" in table(results)


def test_one_class_is_no_classification(run: Run) -> None:
    dataset = tiny_run.color_classes()
    same = ImageSet(dataset.train.images, np.zeros(60, dtype=np.int64))
    results = evaluate(run, Dataset("one", same, same, None), progress=False)
    assert results["notes"] == [
        "No linear probe and no k-NN: all training images are of one class."
    ]


def test_too_few_images_for_the_neighbours(run: Run) -> None:
    config = tiny_run.with_settings("evaluation", neighbors=41)
    results = evaluate(replace(run, config=config), tiny_run.color_classes(), progress=False)
    assert results["notes"] == ["No k-NN: 41 neighbours, but 40 training images."]
    assert "knn" not in results["accuracy"]["run"]
    assert "k-NN," not in table(results)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"alpha": 0.0}, "alpha is 0: the decoder was not trained"),
        ({"beta": 0.0}, "beta is 0: the projection was not trained"),
        ({"score_first_pixel": False}, "The first pixel was not trained"),
    ],
)
def test_losses_that_were_not_trained_are_marked(run: Run, settings: dict, note: str) -> None:
    config = tiny_run.with_settings("objective", **settings)
    dataset = tiny_run.color_classes(12, labelled=False)
    notes = evaluate(replace(run, config=config), dataset, progress=False)["notes"]
    assert notes[0].startswith(note)


def test_without_two_views_there_is_no_contrast(run: Run) -> None:
    views = {"weak_shift": 0, "crop_scale": (1.0, 1.0), "color_jitter": 0.0, "grayscale": 0.0}
    config = tiny_run.with_settings("views", **views)
    dataset = tiny_run.color_classes(12, labelled=False)
    results = evaluate(replace(run, config=config), dataset, progress=False)
    assert results["notes"][0] == "No NT-Xent: both views of an image are always the same."
    assert "contrastive" not in results
    assert "NT-Xent," not in table(results)
    assert "nats per pixel" in table(results)


def test_results_are_written_as_json_and_as_a_table(tmp_path: Path, results: dict) -> None:
    results = copy.deepcopy(results)
    for source, value in (("run", 0.875), ("untrained", 0.25), ("raw_pixels", 0.5)):
        results["accuracy"][source]["linear_probe"] = value
    write_results(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == (
        "colour classes, step 30, seed 0: 20 test images, 40 labelled training images."
    )
    probe = next(line for line in lines if line.startswith("| linear probe, accuracy"))
    assert probe == "| linear probe, accuracy | 87.5% | 25.0% | 50.0% |"
    bits = next(line for line in lines if line.startswith("| bits per pixel"))
    assert bits == f"| bits per pixel | {results['likelihood']['bits_per_pixel']:.3f} | 3.000 |"
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert sorted(set(tables)) == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
