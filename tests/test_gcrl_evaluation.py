"""An evaluation as a whole: its parts, what it keeps, and what it never reads again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from gcrl.config import ConfigError
from gcrl.data import Dataset, ImageSet
from gcrl.evaluation import PARTS, likelihood, suite
from gcrl.evaluation.options import Options
from gcrl.evaluation.store import Store
from gcrl.evaluation.subject import Subject
from gcrl.evaluation.suite import StoppedError, run_parts
from gcrl.probes import NotFiniteError
from gcrl.run import Run

OPTIONS = Options(labels_per_class=(2, 400), draws=2, finetuning_steps=2, corruption_images=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run.tiny_run(tmp_path_factory.mktemp("run"))


def subject_of(run: Run, folder: Path, dataset: Dataset | None = None, **options) -> Subject:
    chosen = replace(OPTIONS, **options)
    return Subject(run, dataset or tiny_run.color_classes(), folder, chosen, progress=False)


def test_every_part_leaves_numbers_a_table_and_pictures(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "noise.npz"
    np.savez(other, images=tiny_run.noise_images(12))
    folder = tmp_path / "results"
    results = run_parts(subject_of(run, folder, ood=(str(other),)))
    assert list(results) == list(PARTS)
    assert json.loads((folder / "results.json").read_text()) == results
    text = (folder / "results.md").read_text()
    for name in PARTS:
        assert "not_measured" not in results[name]
        assert f"## {name}\n" in text
        assert (folder / f"{name}.md").read_text() in text
        assert name == "summary" or list(folder.glob(f"{name}*.png")) or name == "samples"
        for line in (folder / f"{name}.md").read_text().splitlines():
            assert "nan" not in line
    assert (folder / "completions.png").stat().st_size > 0
    supervised = results["ood"]["supervised"]  # the probe and both ways of finetuning
    assert [name.split(":")[0] for name in supervised[::2]] == [
        "probe", "finetuned, labels alone", "finetuned, generative loss kept",
    ]  # fmt: skip
    assert len(results["calibration"]["classifiers"]) == 3


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of likelihood.measure."""
    calls: list[str] = []
    measure = likelihood.measure

    def counting(subject: Subject) -> dict:
        calls.append("likelihood")
        return measure(subject)

    monkeypatch.setattr(likelihood, "measure", counting)
    return calls


def test_a_part_that_is_done_is_kept_until_asked_again(
    run: Run, tmp_path: Path, counted: list[str]
) -> None:
    subject = subject_of(run, tmp_path)
    first = run_parts(subject, ["likelihood"])
    assert run_parts(subject, ["likelihood"]) == first
    assert run_parts(subject_of(run, tmp_path, draws=3), ["likelihood"]) == first  # not its option
    assert len(counted) == 1
    assert run_parts(subject, ["likelihood"], again=True) == first
    assert len(counted) == 2
    (tmp_path / "likelihood.json").write_text("{")  # cut short
    assert run_parts(subject, ["likelihood"]) == first
    assert len(counted) == 3


def test_another_network_or_other_images_are_measured_anew(
    run: Run, tmp_path: Path, counted: list[str]
) -> None:
    first = run_parts(subject_of(run, tmp_path), ["likelihood"])
    other = replace(run, model=run.untrained().model)
    assert run_parts(subject_of(other, tmp_path), ["likelihood"]) != first
    dataset = tiny_run.color_classes()
    changed = replace(dataset, test=ImageSet(255 - dataset.test.images, dataset.test.labels))
    assert run_parts(subject_of(run, tmp_path, changed), ["likelihood"]) != first
    assert run_parts(subject_of(run, tmp_path), ["likelihood"]) == first
    assert len(counted) == 4


def test_what_was_finished_before_an_interruption_is_kept(
    run: Run, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("gcrl.evaluation.calibration.measure", interrupt)
        with pytest.raises(StoppedError, match="interrupted in calibration; what is done is kept"):
            run_parts(subject_of(run, tmp_path), ["calibration", "likelihood"])
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"likelihood"}
    results = run_parts(subject_of(run, tmp_path), ["calibration", "likelihood"])
    assert list(results) == ["likelihood", "calibration"]
    assert len(counted) == 1


def test_what_other_options_measured_stays(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "noise.npz", images=tiny_run.noise_images(12))
    found = run_parts(subject_of(run, tmp_path, ood=(str(tmp_path / "noise.npz"),)), ["ood"])
    run_parts(subject_of(run, tmp_path), ["likelihood"])
    without = run_parts(subject_of(run, tmp_path), ["ood"])
    assert "it takes --ood" in without["ood"]["not_measured"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert set(saved) == {"likelihood", "ood"}
    assert saved["ood"] == found["ood"]
    assert "AUROC" in (tmp_path / "ood.md").read_text()
    other = replace(run, model=run.untrained().model)  # another network's results are none of it
    run_parts(subject_of(other, tmp_path), ["likelihood"])
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"likelihood"}
    run_parts(subject_of(other, tmp_path), ["ood"])
    assert "Not measured" in (tmp_path / "ood.md").read_text()
    assert not (tmp_path / "ood.png").exists()


def test_parts_that_are_none_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parts: expected some of summary, .*; got 'flying'"):
        run_parts(subject_of(run, tmp_path), ["flying"])


@pytest.mark.parametrize(
    ("labels", "reason"),
    [(None, "the images have no labels"), (np.zeros(60, int), "training images are of one class")],
)
@pytest.mark.parametrize("part", ["classification", "finetuning", "calibration", "corruption"])
def test_what_takes_labels_says_so(
    run: Run, tmp_path: Path, part: str, labels: np.ndarray | None, reason: str
) -> None:
    images = ImageSet(tiny_run.color_classes().train.images, labels)
    subject = subject_of(run, tmp_path, Dataset("bare", images, images, None))
    results = run_parts(subject, [part])
    assert reason in results[part]["not_measured"]
    assert (
        f"Not measured: {results[part]['not_measured']}." in (tmp_path / f"{part}.md").read_text()
    )


def test_ood_without_labels_has_the_unsupervised_scores(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "noise.npz", images=tiny_run.noise_images(12))
    dataset = tiny_run.color_classes(labelled=False)
    subject = subject_of(run, tmp_path, dataset, ood=(str(tmp_path / "noise.npz"),))
    results = run_parts(subject, ["ood"])["ood"]
    assert results["supervised"] == []
    assert "No supervised scores: the images have no labels." in results["notes"]
    assert len(results["sets"]["noise"]["scores"]) == 6


def test_ood_of_nothing_says_what_it_takes(run: Run, tmp_path: Path) -> None:
    assert "it takes --ood" in run_parts(subject_of(run, tmp_path), ["ood"])["ood"]["not_measured"]


def test_a_twentieth_image_is_the_least(run: Run, tmp_path: Path) -> None:
    subject = subject_of(run, tmp_path, tiny_run.color_classes(19))
    results = run_parts(subject, ["classification"])["classification"]
    assert "expected at least 20 training images" in results["not_measured"]


@pytest.mark.parametrize(
    ("limit", "learned", "held_out"),
    [(60, [18, 18, 18], [2, 2, 2]), (30, None, [10, 10, 10]), (56, [18, 18, 18], [2, 2, 2])],
)
def test_what_is_held_out_is_a_share_of_every_class(
    limit: int, learned: list[int] | None, held_out: list[int], run: Run, tmp_path: Path
) -> None:
    subject = subject_of(run, tmp_path, train_images=limit)
    train, validation = subject.train, subject.validation
    assert np.bincount(validation.labels).tolist() == held_out
    if learned:
        assert np.bincount(train.labels).tolist() == learned
    else:
        assert len(train) == limit
    images = {image.tobytes() for image in validation.images}
    assert not images & {image.tobytes() for image in train.images}
    assert images < {image.tobytes() for image in subject.dataset.train.images}


def test_of_many_images_five_thousand_are_held_out(run: Run, tmp_path: Path) -> None:
    many = ImageSet(np.zeros((60_000, 1, 1, 3), np.uint8), np.arange(60_000) % 3)
    dataset = replace(tiny_run.color_classes(), train=many)
    for limit, learned in ((60_000, 55_000), (10_000, 10_000)):
        subject = subject_of(run, tmp_path, dataset, train_images=limit)
        assert (len(subject.train), len(subject.validation)) == (learned, 5000)


def test_limits_choose_by_the_seed(run: Run, tmp_path: Path) -> None:
    subject = subject_of(run, tmp_path, train_images=30, test_images=10)
    assert (len(subject.train), len(subject.test)) == (30, 10)
    other = replace(run, config=tiny_run.with_settings("runtime", seed=5))
    again = subject_of(other, tmp_path, train_images=30, test_images=10)
    assert not np.array_equal(subject.test.images, again.test.images)


def test_features_are_read_once_and_never_stale(run: Run, tmp_path: Path, monkeypatch) -> None:
    subject = subject_of(run, tmp_path)
    images = subject.test.images
    first = subject.features.encoding(images)
    torch.testing.assert_close(torch.from_numpy(first), run.encode(images))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "layers", None)  # nothing is computed
        assert np.array_equal(subject_of(run, tmp_path).features.encoding(images), first)
    dimmed = images // 2
    torch.testing.assert_close(
        torch.from_numpy(subject.features.encoding(dimmed)), run.encode(dimmed)
    )
    other = run.untrained()
    assert not np.array_equal(subject.features_of(other).encoding(images), first)
    recolored = replace(run, palette=run.palette.flip(0))
    assert not np.array_equal(subject.features_of(recolored).encoding(images), first)


def test_a_damaged_store_is_computed_anew(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.arange(3)

    for damage in (None, b"", b"\x93NUMPY", b"nonsense"):
        if damage is not None:
            store.path("kind", [b"a"]).write_bytes(damage)
        assert store.get("kind", [b"a"], compute).tolist() == [0, 1, 2]
        assert store.get("kind", [b"a"], compute).tolist() == [0, 1, 2]
    assert len(calls) == 4
    paths = {store.path("kind", parts) for parts in ([b"a", b"b"], [b"ab"], [b"ab", b""])}
    assert len(paths) == 3


def test_features_that_are_not_finite_are_refused(run: Run, tmp_path: Path) -> None:
    broken = replace(run, model=run.untrained().model)
    torch.nn.init.constant_(broken.model.outer_norm.bias, torch.nan)
    with pytest.raises(NotFiniteError, match="features: 40 of 40 images have NaN"):
        run_parts(subject_of(broken, tmp_path), ["classification"])
    assert not (tmp_path / "classification.json").exists()


def test_layers_end_where_the_encoding_and_the_prediction_begin(run: Run) -> None:
    images = tiny_run.noise_images(5)
    layers, names = run.layers(images), run.model.layer_names
    assert names == ["embedding", "outer 1", "outer 2", "encoding", "inner 1"]
    assert layers.shape == (5, 5, 16)
    torch.testing.assert_close(layers[:, 3], run.encode(images))
    seen = []
    run.model.inner_norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].mean((1, 2))))
    run.log_prob(images)
    run.model.inner_norm._forward_pre_hooks.clear()
    torch.testing.assert_close(layers[:, 4], torch.cat(seen))


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "same").mkdir(parents=True)
    with pytest.raises(ConfigError, match="ood: expected different names, got 'same' twice"):
        Options(ood=(str(tmp_path / "a" / "same"), str(tmp_path / "b" / "same"))).validate()


def test_ood_images_that_change_are_measured_anew(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "other.npz"
    np.savez(file, images=tiny_run.noise_images(12))
    subject = subject_of(run, tmp_path, tiny_run.color_classes(labelled=False), ood=(str(file),))
    run_parts(subject, ["ood"])
    assert suite.find(subject, "ood") is not None
    np.savez(file, images=tiny_run.noise_images(14))
    assert suite.find(subject, "ood") is None
    assert run_parts(subject, ["ood"])["ood"]["sets"]["other"]["images"] == 14


@pytest.mark.parametrize("images", [np.zeros((9, 4, 4, 2), np.uint8), np.zeros((9, 4, 4, 3))])
def test_ood_images_of_another_kind_are_refused(
    run: Run, tmp_path: Path, images: np.ndarray
) -> None:
    np.savez(tmp_path / "odd.npz", images=images)
    with pytest.raises(ValueError, match=r"odd.npz: 'images': expected uint8 \[N, height"):
        run_parts(subject_of(run, tmp_path, ood=(str(tmp_path / "odd.npz"),)), ["ood"])
