"""Each part of an evaluation on cases that are worked out by hand."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from gcrl.config import ConfigError
from gcrl.data import ImageSet
from gcrl.evaluation import calibration, classification, finetuning, likelihood, ood, probe, samples
from gcrl.evaluation.options import Options
from gcrl.evaluation.subject import Subject
from gcrl.probes import STRENGTHS, NotFiniteError, fit
from gcrl.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run.tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def subject(run: Run, tmp_path: Path) -> Subject:
    options = Options(labels_per_class=(2, 400), draws=3, finetuning_steps=2)
    return Subject(run, tiny_run.color_classes(), tmp_path, options, progress=False)


class Planted:
    """Features that a test has chosen, by the images' first value."""

    fingerprint = b"planted"

    def __init__(self, layers: np.ndarray) -> None:
        self.planted = layers  # [images, layers, width]

    def layers(self, images: np.ndarray) -> np.ndarray:
        return self.planted[images[:, 0, 0, 0]]

    def layer(self, images: np.ndarray, layer: int) -> np.ndarray:
        return self.layers(images)[:, layer]


def numbered(count: int, labels: np.ndarray, start: int = 0) -> ImageSet:
    images = np.zeros((count, 4, 4, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = start + np.arange(count)
    return ImageSet(images, labels)


@pytest.fixture
def planted(run: Run, tmp_path: Path) -> Subject:
    """Layer 2 of five tells the three classes of 60 and 30 images apart, the others nothing."""
    labels = np.arange(90) % 3
    rng = np.random.default_rng(0)
    layers = rng.standard_normal((90, 5, 3))
    layers[:, 2] = 5 * np.eye(3)[labels] + 0.1 * rng.standard_normal((90, 3))
    dataset = replace(
        tiny_run.color_classes(),
        train=numbered(60, labels[:60]),
        test=numbered(30, labels[60:], 60),
    )
    options = Options(train_images=60, test_images=30, labels_per_class=(2, 18, 19), draws=3)
    subject = Subject(run, dataset, tmp_path, options, progress=False)
    subject.__dict__["features"] = Planted(layers)
    return subject


def test_the_probe_takes_the_layer_that_tells_the_classes_apart(planted: Subject) -> None:
    choice = probe.choose(planted)
    assert choice.layer == 2
    assert choice.accuracy.shape == (5, len(STRENGTHS))
    assert choice.accuracy[2, 0] == 1.0
    assert choice.accuracy[[0, 1, 3, 4]].max() < 1.0


def test_the_sweep_never_sees_the_test_images_and_is_judged_on_the_held_out(
    planted: Subject,
) -> None:
    train, held_out = planted.train, planted.validation
    expected = np.empty((5, len(STRENGTHS)))
    for layer, strength in np.ndindex(expected.shape):
        fitted = fit(planted.features.layer(train.images, layer), train.labels, STRENGTHS[strength])
        predicted = fitted.predict(planted.features.layer(held_out.images, layer))
        expected[layer, strength] = np.mean(predicted == held_out.labels)
    planted.__dict__["test"] = None
    planted.__dict__["labels"] = (train.labels, None)
    assert np.array_equal(probe.choose(planted).accuracy, expected)


def test_classification_of_planted_features(planted: Subject) -> None:
    results = classification.measure(planted)
    assert (results["layer"], results["linear_probe"]) == ("outer 2", 1.0)
    assert (results["train_images"], results["held_out"], results["test_images"]) == (54, 6, 30)
    assert results["chance"] == pytest.approx(1 / 3)
    assert results["knn"] == {"neighbors": 3, "accuracy": 1.0}
    assert [few["labels_per_class"] for few in results["few_labels"]] == [2, 18]
    assert all(few["accuracy"] == 1.0 and few["deviation"] == 0 for few in results["few_labels"])
    assert results["notes"] == ["No probe of 19 labels a class: one class has fewer."]
    text = classification.table(results)
    assert "| linear probe on 'outer 2' | 100.0% |" in text
    assert "| probe of 2 labels a class | 100.0% ± 0.0 |" in text


def test_a_class_of_the_test_images_alone_is_named(planted: Subject) -> None:
    test = planted.test
    planted.__dict__["test"] = ImageSet(test.images, np.where(test.labels == 0, 9, test.labels))
    results = classification.measure(planted)
    assert results["linear_probe"] == pytest.approx(2 / 3)
    assert "1 classes of the test images are not among the training images." in results["notes"]


def test_few_labels_are_so_few(planted: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def remember(features: np.ndarray, labels: np.ndarray, strength: float):
        sizes.append(np.bincount(labels).tolist())
        return fit(features, labels, strength)

    monkeypatch.setattr(classification, "fit", remember)
    parts = (planted.train, planted.validation, planted.test)
    features = [planted.features.layer(part.images, 2) for part in parts]
    classification._few_labels(planted, *features, 4)
    assert sizes == [[4, 4, 4]] * (3 * len(STRENGTHS))


def test_logits_of_a_probe_give_its_probabilities() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 3))
    for classes in (2, 3):
        fitted = fit(features, np.arange(40) % classes, 1.0)
        scores = probe.logits(fitted, features)
        assert scores.shape == (40, classes)
        np.testing.assert_allclose(finetuning.softmax(scores), fitted.predict_proba(features))


def test_likelihood_by_hand(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    nats = np.arange(20.0)[::-1] * 16  # an image; 16 pixels
    monkeypatch.setattr(type(subject.features), "log_prob", lambda *_: -nats)
    results = likelihood.measure(subject)
    assert results["nats_per_pixel"] == pytest.approx(9.5)
    assert results["bits_per_pixel"] == pytest.approx(9.5 / math.log(2))
    assert results["deviation"] == pytest.approx(math.sqrt(35))  # of 0..19
    assert results["standard_error"] == pytest.approx(math.sqrt(35 / 20))
    assert sum(results["histogram"]["counts"]) == 20
    assert results["most_likely"][0] == {"image": 19, "nats_per_pixel": 0.0}
    assert results["least_likely"][0] == {"image": 0, "nats_per_pixel": 19.0}
    assert "| nats per pixel | 9.500 | 1.323 | 5.916 | 2.079 |" in likelihood.table(results)


def test_detection_by_hand() -> None:
    # (inside, outside) pairs: 7 of 8 in order, one of them a tie
    found = ood.detection(np.array([0.0, 1, 2, 3]), np.array([3.0, 4]))
    assert found["auroc"] == pytest.approx(7.5 / 8)
    # thresholds 4, 3: precision 1 at recall 1/2, then 2/3 at recall 1
    assert found["aupr"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["fpr"] == 0.5  # all four are kept up to 3, and with them the other at 3
    inside = np.arange(100.0)
    assert ood.detection(inside, np.array([94.0, 94.5, 95.0, 200.0]))["fpr"] == 0.25
    assert ood.detection(inside, inside)["auroc"] == 0.5


def test_unsupervised_scores_by_hand(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    train = np.array([[2.0, 0], [-2, 0], [0, 2], [0, -2]] * 10)  # covariance 2 I
    other = np.array([[3.0, 4.0], [0.0, 1.0]])
    features = type(subject.features)
    pick = lambda images, own, given: own if len(images) == 40 else given  # noqa: E731
    monkeypatch.setattr(features, "encoding", lambda _, i: pick(i, train, other))
    monkeypatch.setattr(
        features, "log_prob", lambda _, i: pick(i, np.full(40, -10.0), np.array([-7.0, -14.0]))
    )
    scores = ood.unsupervised_scores(subject)
    images = tiny_run.noise_images(2)
    assert scores["likelihood"](images).tolist() == [7, 14]
    assert scores["typicality"](images).tolist() == [3, 4]
    # Ledoit and Wolf leave a multiple of the identity as it is
    np.testing.assert_allclose(scores["Mahalanobis distance"](images), [25 / 2, 1 / 2])
    # at length 1, the third neighbour is one of ten equal ones
    np.testing.assert_allclose(
        scores["distance to neighbour 3"](images), [math.hypot(0.6, 0.2), 0], atol=1e-7
    )
    bits = []
    for image in subject.run.quantize(images).numpy():
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG", optimize=True)
        bits.append(8 * len(content.getvalue()))
    np.testing.assert_allclose(scores["compressed size"](images), [-bits[0], -bits[1]])
    expected = np.array([7, 14]) / math.log(2) - bits
    np.testing.assert_allclose(scores["likelihood corrected by size"](images), expected)


def test_the_gaussian_has_the_shape_of_the_training_images(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    train = rng.standard_normal((40, 3)) @ np.diag([9.0, 1.0, 0.1]) + 5
    features = type(subject.features)
    monkeypatch.setattr(features, "log_prob", lambda _, i: np.zeros(len(i)))
    other = np.array([[14.0, 5, 5], [5, 6, 5], [5, 5, 5.1]])
    monkeypatch.setattr(features, "encoding", lambda _, i: train if len(i) == 40 else other)
    distance = ood.unsupervised_scores(subject)["Mahalanobis distance"](tiny_run.noise_images(3))
    centred = train - train.mean(0)
    covariance = centred.T @ centred / 40
    identity = np.trace(covariance) / 3 * np.eye(3)
    # Ledoit and Wolf (2004): the share of the identity is beta / delta.
    spread = [np.outer(row, row) - covariance for row in centred]
    beta = np.mean([(part**2).sum() for part in spread]) / 40
    share = min(1.0, beta / ((covariance - identity) ** 2).sum())
    shrunk = (1 - share) * covariance + share * identity
    off = other - train.mean(0)
    np.testing.assert_allclose(distance, np.einsum("ni,ij,nj->n", off, np.linalg.inv(shrunk), off))


def test_too_few_neighbours_leave_their_distance_out(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "noise.npz", images=tiny_run.noise_images(12))
    many = replace(run, config=tiny_run.with_settings("evaluation", neighbors=200))
    options = Options(ood=(str(tmp_path / "noise.npz"),))
    results = ood.measure(
        Subject(many, tiny_run.color_classes(), tmp_path, options, progress=False)
    )
    assert not any("neighbour" in score for score in results["unsupervised"])
    assert "No distance to neighbour 200, but 40 training images." in results["notes"]


def test_likelihoods_that_are_not_finite_are_answered(run: Run, tmp_path: Path) -> None:
    broken = run.untrained()
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    subject = Subject(broken, tiny_run.color_classes(), tmp_path, progress=False)
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        likelihood.measure(subject)


def test_without_its_loss_a_decoder_is_not_trained(run: Run, tmp_path: Path) -> None:
    bare = replace(run, config=tiny_run.with_settings("objective", alpha=0.0))
    np.savez(tmp_path / "noise.npz", images=tiny_run.noise_images(12))
    options = Options(ood=(str(tmp_path / "noise.npz"),))
    subject = Subject(bare, tiny_run.color_classes(), tmp_path, options, progress=False)
    for part in (likelihood, ood):
        assert "alpha is 0: the decoder was not trained" in part.table(part.measure(subject))


def test_a_damaged_network_is_trained_anew(subject: Subject) -> None:
    results = finetuning.measure(subject)
    for path in subject.store.folder.glob("finetuned-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    assert finetuning.measure(subject) == results


def test_supervised_scores_by_hand(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.log([[0.5, 0.25, 0.25], [2.0, 6.0, 2.0]])
    monkeypatch.setattr(probe, "logits", lambda *_: logits)
    scores = ood.supervised_scores(subject)
    assert list(scores) == ["probe: softmax", "probe: energy"]
    images = tiny_run.noise_images(2)
    np.testing.assert_allclose(scores["probe: softmax"](images), [-0.5, -0.6])
    np.testing.assert_allclose(scores["probe: energy"](images), [0, -math.log(10)], atol=1e-12)


def test_images_that_are_likelier_than_the_runs_own_are_pointed_out(
    run: Run, tmp_path: Path
) -> None:
    likely = int(run.log_prob(tiny_run.noise_images(200)).argmax())
    np.savez(tmp_path / "likely.npz", images=tiny_run.noise_images(200)[[likely] * 20])
    options = Options(ood=(str(tmp_path / "likely.npz"),))
    noise = ImageSet(tiny_run.noise_images(60, seed=7), None)
    dataset = replace(tiny_run.color_classes(), train=noise, test=noise)
    results = ood.measure(Subject(run, dataset, tmp_path, options, progress=False))
    assert results["sets"]["likely"]["scores"]["likelihood"]["auroc"] < 0.5
    assert "more likely than its own test images: likely (AUROC " in results["notes"][-1]
    assert results["notes"][-1] in ood.table(results)
    unlikely = {"unlikely": {"scores": {"likelihood": {"auroc": 0.5}}}}
    assert ood._more_likely(unlikely) == []


def test_reliability_by_hand() -> None:
    top = np.array([0.8] * 5 + [0.62] * 5)
    probabilities = np.stack((top, 1 - top), 1)
    labels = np.array([3, 3, 3, 7, 7, 3, 3, 3, 3, 3])
    found = calibration.reliability(probabilities, np.array([3, 7]), labels)
    assert found["accuracy"] == 0.8
    assert found["confidence"] == pytest.approx(0.71)
    assert found["calibration_error"] == pytest.approx((0.2 + 0.38) / 2, abs=1e-6)
    filled = {i: entry for i, entry in enumerate(found["reliability"]) if entry["images"]}
    assert list(filled) == [9, 12]  # 15 bins, of 1/15 each
    assert filled[9] == {"images": 5, "confidence": pytest.approx(0.62), "accuracy": 1.0}
    assert filled[12] == {"images": 5, "confidence": pytest.approx(0.8), "accuracy": 0.6}


def test_the_calibration_error_is_that_of_the_bins_that_are_drawn() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 500)
    labels = rng.integers(0, 3, 500)
    found = calibration.reliability(probabilities, np.arange(3), labels)
    gap = sum(
        entry["images"] / 500 * abs(entry["accuracy"] - entry["confidence"])
        for entry in found["reliability"]
        if entry["images"]
    )
    assert found["calibration_error"] == pytest.approx(gap, abs=1e-6)


def test_finetuning_lowers_the_loss_of_the_labels_and_leaves_the_run_alone(run: Run) -> None:
    dataset = tiny_run.color_classes()
    before = run.log_prob(dataset.test.images)
    optim = replace(run.config.optim, steps=40, learning_rate=3e-3, warmup_steps=4, batch_size=20)
    options = {"progress": False, "name": "test"}
    alone, kept = (
        finetuning.train_classifier(run, dataset.train, optim, alpha=alpha, **options)
        for alpha in (0.0, 1.0)
    )
    for classifier in (alone, kept):
        logits = classifier.logits(classifier.run.encode(dataset.test.images).numpy())
        assert np.mean(classifier.classes[logits.argmax(1)] == dataset.test.labels) > 0.8
    assert torch.equal(run.log_prob(dataset.test.images), before)
    nats = [-c.run.log_prob(dataset.test.images).mean() for c in (alone, kept)]
    assert nats[1] < 0.5 * min(nats[0], -before.mean())  # forgetting alone changes it less


def test_the_head_sees_what_differs_between_images() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(100 + 0.01 * rng.normal(size=(50, 3))).float()
    features[:, 2] = 7  # the same for all
    head = finetuning.Head(3, 2)
    assert torch.equal(head(features), torch.zeros(50, 2))
    head.standardise(features)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    scores = head(features).detach()
    assert scores.mean(0).abs().max() < 1e-2
    assert scores[:, 0].std(correction=0) == pytest.approx(1, rel=1e-3)
    assert torch.equal(scores[:, 1], torch.zeros(50))


def test_a_classifier_is_the_average_of_its_weights(run: Run) -> None:
    dataset = tiny_run.color_classes()

    def head_of(ema: float, steps: int) -> torch.Tensor:
        optim = replace(run.config.optim, steps=steps, warmup_steps=0, batch_size=20, ema=ema)
        classifier = finetuning.train_classifier(
            run, dataset.train, optim, alpha=0.0, progress=False, name="test"
        )
        return classifier.head.linear.weight.detach()

    # The head begins at zero, so that after one step its average is what a share of it is.
    torch.testing.assert_close(head_of(0.75, 1), 0.25 * head_of(0.0, 1))
    assert head_of(0.0, 1).abs().max() > 0


@pytest.mark.parametrize(("ema", "steps", "expected"), [
    (0.9995, 300, 1 - 1 / 30), (0.9, 300, 0.9), (0.98, 5, 0.0), (0.98, 40_000, 0.98),
])  # fmt: skip
def test_a_short_training_averages_its_end_alone(ema: float, steps: int, expected: float) -> None:
    optim = replace(tiny_run.CONFIG.optim, ema=ema, steps=steps)
    assert finetuning.averaged(optim) == replace(optim, ema=pytest.approx(expected))


def test_a_long_average_does_not_bring_the_untrained_network_back(run: Run, tmp_path: Path) -> None:
    long = replace(run, config=tiny_run.with_settings("optim", ema=0.9995))
    options = Options(finetuning_steps=30, finetuning_rate=3e-3)
    for name in finetuning.KEPT:
        subject = Subject(long, tiny_run.color_classes(), tmp_path, options, progress=False)
        classifier = finetuning._finetuned(subject, name)
        # 0.9995^30 = 0.985 of the head, which begins at zero, would be left.
        logits = classifier.logits(long.encode(subject.test.images).numpy())
        assert finetuning.softmax(logits).max(1).mean() > 0.4


def test_the_head_is_standardised_by_images_of_every_class(run: Run, monkeypatch) -> None:
    monkeypatch.setattr(finetuning, "STANDARDISED", 15)
    train = tiny_run.color_classes().train
    ordered = train.take(np.argsort(train.labels, kind="stable"))  # as a folder of classes is read
    optim = replace(run.config.optim, steps=1, warmup_steps=0, batch_size=20)
    classifier = finetuning.train_classifier(
        run, ordered, optim, alpha=0.0, progress=False, name="test"
    )
    everything, one_class = run.encode(ordered.images), run.encode(ordered.images[:15])
    off = (classifier.head.mean - everything.mean(0)).norm()
    assert off < 0.5 * (one_class.mean(0) - everything.mean(0)).norm()


def test_what_varies_by_rounding_alone_is_not_divided() -> None:
    head = finetuning.Head(2, 3)
    features = torch.stack((torch.full((1000,), 0.1), torch.arange(1000.0)), 1)
    features[::2, 0] = torch.nextafter(features[0, 0], torch.tensor(1.0))
    assert features.std(0, correction=0)[0] > 0
    head.standardise(features)
    assert head.deviation[0] == 1
    assert head.deviation[1] == pytest.approx(288.67, abs=0.01)


def test_finetuned_networks_are_kept(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finetuning.find(subject) == {}
    results = finetuning.measure(subject)
    monkeypatch.setattr(finetuning, "train_classifier", None)  # nothing is trained
    assert finetuning.measure(subject) == results
    assert set(finetuning.find(subject)) == set(finetuning.KEPT)
    other = replace(subject, options=replace(subject.options, finetuning_steps=3))
    assert finetuning.find(other) == {}


class Means(torch.nn.Module):
    """Two features of an image: the means of its first two channels."""

    num_features = 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :2].double().mean((2, 3))


def test_the_frechet_distance_by_hand() -> None:
    real = torch.zeros(4, 4, 4, 3, dtype=torch.uint8)
    real[2:, :, :, 0] = 6  # first channel: mean 3, variance 12
    generated = torch.full((4, 4, 4, 3), 1, dtype=torch.uint8)
    distance = samples.frechet_distance(real, generated, FrechetInceptionDistance(Means()))
    assert distance == pytest.approx((3 - 1) ** 2 + 1**2 + 12, rel=1e-4)


def test_samples_for_the_distance_are_drawn_once(subject: Subject, monkeypatch) -> None:
    drawn = samples.draw_images(subject, 5)
    assert torch.equal(drawn, subject.run.sample(5, seed=0))
    monkeypatch.setattr(Run, "sample", None)
    assert torch.equal(samples.draw_images(subject, 5), drawn)


def test_inception_weights_that_cannot_be_read(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"none")
    with pytest.raises(ConfigError, match=r"torch-fidelity|cannot be read as Inception weights"):
        samples.inception_metric(tmp_path / "weights.pth")
    assert "takes --inception" in samples.table(samples.measure(subject))
