"""A study: what its runs share, what they differ in, and how its question is decided."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image

from gcrl.cli import main
from gcrl.config import Config, ConfigError, ModelConfig
from gcrl.data import load_dataset
from gcrl.distributed import Team
from gcrl.evaluation.options import Options
from gcrl.evaluation.suite import StoppedError
from gcrl.run import load
from gcrl.study import report
from gcrl.study.compute import training_flops, training_seconds
from gcrl.study.runs import Study, summarise
from gcrl.study.variants import LABELS, TRAINED, UNTRAINED, VARIANTS, configure
from gcrl.study.verdict import judge
from gcrl.trainer import Trainer


def config_of(source: Path) -> Config:
    return replace(
        tiny_run.CONFIG,
        data=replace(tiny_run.CONFIG.data, data=str(source)),
        optim=replace(tiny_run.CONFIG.optim, batch_size=10, steps=4, warmup_steps=1),
        runtime=replace(tiny_run.CONFIG.runtime, device="cpu", log_every=2, checkpoint_every=2),
    )


def with_palette(config: Config, path: Path) -> Config:
    return replace(config, data=replace(config.data, palette=str(path)))


def save_images(folder: Path, *, labelled: bool = True) -> Path:
    if (folder / "noise.npz").exists():
        return folder / "colors.npz"
    data = tiny_run.color_classes()
    arrays = {"images": data.train.images, "test_images": data.test.images}
    if labelled:
        arrays |= {"labels": data.train.labels, "test_labels": data.test.labels}
    np.savez(folder / "colors.npz", **arrays)
    np.savez(folder / "noise.npz", images=tiny_run.noise_images(15))
    return folder / "colors.npz"


def study_of(folder: Path, seeds: tuple[int, ...] = (0,), *, labelled: bool = True) -> Study:
    source = save_images(folder, labelled=labelled)
    options = Options(ood=(str(folder / "noise.npz"),), labels_per_class=(2,), draws=1)
    return Study(config_of(source), folder / "study", seeds, options, progress=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, Any]:
    return study_of(place, (0, 3)).conduct()


def test_a_study_compares_six_networks_on_every_seed(place: Path, results: dict[str, Any]) -> None:
    assert [seed["seed"] for seed in results["seeds"]] == [0, 3]
    for seed in results["seeds"]:
        assert set(seed["networks"]) == set(VARIANTS)
        for name, found in seed["networks"].items():
            assert 0 <= found["accuracy"] <= 1
            assert ("bits_per_pixel" in found) == (name in ("hybrid", "generative"))
            assert ("likelihood" in found["auroc"]["noise"]) == ("bits_per_pixel" in found)
            assert "Mahalanobis distance" in found["auroc"]["noise"]
            assert found["images_seen"] == (0 if name == UNTRAINED else 40)
        assert 0 <= seed["networks"][LABELS]["head_accuracy"] <= 1
    assert [(v["measure"], v["against"]) for v in results["verdicts"]] == [
        ("accuracy", "contrastive"), ("accuracy", "simclr"), ("bits_per_pixel", "generative"),
        ("auroc", "generative"),
    ]  # fmt: skip
    folder = place / "study"
    assert json.loads((folder / "study.json").read_text()) == results
    text = (folder / "study.md").read_text()
    assert text.count("\n- The hybrid ") == 4
    assert text == report.table(results)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    networks, scores = lines[: 2 + len(VARIANTS)], lines[2 + len(VARIANTS) :]
    assert {line.count("|") for line in networks} == {7}
    assert scores[0] == "| score | network | noise, N = 15 |"
    with_decoder = 2  # the likelihood and its correction are the hybrid's and the generative one's
    assert len(scores) == 2 + 2 * with_decoder + len(VARIANTS) + 1
    assert scores[-1].startswith("| compressed size | none |")
    with Image.open(folder / "study.png") as picture:
        assert picture.size[0] > 900


def test_a_finished_study_computes_nothing_again(
    place: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "advance", None)
    monkeypatch.setattr("gcrl.evaluation.suite._measure", None)
    monkeypatch.setattr("gcrl.evaluation.finetuning.train_classifier", None)
    assert study_of(place, (0, 3)).conduct() == results


def test_a_whole_seed_needs_its_folder_no_more(
    place: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(place, tmp_path / "copy")
    study = study_of(tmp_path / "copy", (0, 3))
    study = replace(study, config=config_of(place / "colors.npz"))
    shutil.rmtree(study.folder / "seed-0")
    shutil.rmtree(study.folder / "seed-3")
    monkeypatch.setattr(Trainer, "advance", None)
    assert study.conduct() == results
    assert json.loads((study.folder / "study.json").read_text()) == results
    palette = tmp_path / "palette.npy"
    np.save(palette, tiny_run.PALETTE.numpy())
    noise = tmp_path / "noise.npz"
    np.savez(noise, images=tiny_run.noise_images(15, seed=7))
    others = (
        ("options", replace(study, options=replace(study.options, draws=2))),
        ("options", replace(study, options=replace(study.options, ood=(str(noise),)))),
        ("palette", replace(study, config=with_palette(study.config, palette))),
    )
    written = (study.folder / "study.json").read_bytes()
    for key, other in others:
        with pytest.raises(ConfigError, match=rf"another study \(in .*{key}.*runs of seed 0, 3"):
            other.conduct()
    assert (study.folder / "study.json").read_bytes() == written
    del (saved := json.loads(json.dumps(results)))["seeds"][1]["networks"]["simclr"]
    (study.folder / "study.json").write_text(json.dumps(saved))
    with pytest.raises(TypeError, match="NoneType"):
        study.conduct()


def test_seeds_join_those_that_are_there(
    place: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(place, tmp_path / "copy")
    study = replace(study_of(tmp_path / "copy", (3,)), config=config_of(place / "colors.npz"))
    assert study.conduct() == results
    monkeypatch.setattr(Study, "_measure", lambda *_: {**results["seeds"][0]["networks"]["hybrid"]})
    joined = replace(study, seeds=(1,)).conduct()
    assert [seed["seed"] for seed in joined["seeds"]] == [0, 1, 3]
    assert joined["seeds"][::2] == results["seeds"]


def test_other_options_measure_the_same_runs_anew(
    place: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(place, tmp_path / "copy")
    study = replace(study_of(tmp_path / "copy", (0, 3)), config=config_of(place / "colors.npz"))
    monkeypatch.setattr(Trainer, "advance", None)
    monkeypatch.setattr("gcrl.evaluation.finetuning.train_classifier", None)
    fewer = replace(study, options=replace(study.options, test_images=20)).conduct()
    assert {n["test_images"] for s in fewer["seeds"] for n in s["networks"].values()} == {20}


def test_the_networks_start_alike_and_see_the_same_images(tmp_path: Path) -> None:
    config = config_of(save_images(tmp_path))
    dataset = load_dataset(config.data.data, (4, 4))
    team = Team(torch.device("cpu"))
    trainers = {
        name: Trainer(configure(config, name, 5), dataset, tiny_run.PALETTE, team)
        for name in TRAINED
    }
    first = trainers["hybrid"]
    for trainer in trainers.values():
        for ours, theirs in zip(trainer.model.parameters(), first.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(trainer.batch(0), first.batch(0))
    weak = {name: trainer.tokens(0)[0] for name, trainer in trainers.items()}
    strong = {name: trainer.tokens(0)[1] for name, trainer in trainers.items()}
    assert torch.equal(weak["contrastive"], weak["hybrid"])
    assert torch.equal(weak["generative"], weak["hybrid"])
    assert torch.equal(strong["contrastive"], strong["hybrid"])
    assert strong["generative"] is None
    assert not torch.equal(weak["simclr"], weak["hybrid"])
    assert not torch.equal(weak["simclr"], strong["simclr"])


def test_what_the_networks_differ_in() -> None:
    config = tiny_run.CONFIG
    changes = {}
    for name in TRAINED:
        flat = configure(config, name, 0).flat()
        differing = {key: value for key, value in flat.items() if value != config.flat()[key]}
        assert differing.pop("evaluate") is False
        changes[name] = differing
    assert changes == {
        "hybrid": {},
        "contrastive": {"alpha": 0.0},
        "simclr": {"alpha": 0.0, "two_strong": True},
        "generative": {"beta": 0.0},
    }
    assert configure(config, "hybrid", 9).runtime.seed == 9


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[Path, int]] = []
    advance = Trainer.advance

    def counting(trainer: Trainer, limit: int = 6) -> None:
        if len(steps) == limit:
            raise KeyboardInterrupt
        steps.append((tmp_path, trainer.step))
        advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", counting)
        with pytest.raises(StoppedError, match="interrupted in contrastive, seed 0; what is done"):
            study_of(tmp_path).conduct()
    done = json.loads((tmp_path / "study" / "study.json").read_text())
    assert set(done["seeds"][0]["networks"]) == {"hybrid"}
    assert "No verdict yet" in (tmp_path / "study" / "study.md").read_text()
    monkeypatch.setattr(Trainer, "advance", lambda trainer: counting(trainer, 99))
    results = study_of(tmp_path).conduct()
    assert set(results["seeds"][0]["networks"]) == set(VARIANTS)
    # 4 of the hybrid and 2 before, saved; then 2 more and 4 of each of two others
    assert [step for _, step in steps] == [0, 1, 2, 3, 0, 1, 2, 3, *[0, 1, 2, 3] * 2]


def test_without_labels_likelihood_and_ood_are_compared(tmp_path: Path) -> None:
    results = study_of(tmp_path, labelled=False).conduct()
    networks = results["seeds"][0]["networks"]
    assert set(networks) == set(VARIANTS) - {LABELS}
    assert "accuracy" not in networks["hybrid"]
    assert [v["measure"] for v in results["verdicts"]] == ["bits_per_pixel", "auroc"]
    assert "bits per pixel" in report.table(results)


def seed_of(hybrid: tuple[float, float], contrastive: float, generative: float) -> dict[str, Any]:
    return {
        "hybrid": {"accuracy": hybrid[0], "bits_per_pixel": hybrid[1], "auroc": {}},
        "contrastive": {"accuracy": contrastive, "auroc": {}},
        "simclr": {"accuracy": 0.1, "auroc": {}},
        "generative": {"bits_per_pixel": generative, "auroc": {}},
    }


@pytest.mark.parametrize(
    ("hybrid", "keeps"),
    [((0.491, 4.029), [True, True, True]), ((0.489, 4.031), [False, True, False])],
)
def test_one_seed_is_judged_by_the_margins(hybrid: tuple[float, float], keeps: list[bool]) -> None:
    verdicts = judge([seed_of(hybrid, 0.5, 4.0)], [])
    assert [verdict["keeps"] for verdict in verdicts] == keeps
    assert verdicts[0]["short"] == pytest.approx(0.5 - hybrid[0])
    assert verdicts[2]["short"] == pytest.approx(hybrid[1] - 4)
    assert [verdict["allowed"] for verdict in verdicts] == [0.01, 0.01, 0.03]


def test_a_shortfall_of_the_margin_is_kept() -> None:
    for reference in np.round(np.arange(0.15, 1, 0.01), 2):  # some differences are rounded up
        hybrid = (round(reference - 0.01, 2), round(4 + reference + 0.03, 2))
        verdicts = judge([seed_of(hybrid, reference, 4 + reference)], [])
        assert all(verdict["keeps"] for verdict in verdicts)


def test_several_seeds_allow_two_standard_errors() -> None:
    short = [0.00, 0.06]  # mean 0.03, deviation sqrt(2) * 0.03, error 0.03
    verdict = judge([seed_of((0.5 - s, 4.0), 0.5, 4.0) for s in short], [])[0]
    assert verdict["standard_error"] == pytest.approx(0.03)
    assert verdict["allowed"] == pytest.approx(0.06)
    assert verdict["keeps"]
    short = [0.02, 0.021]
    assert not judge([seed_of((0.5 - s, 4.0), 0.5, 4.0) for s in short], [])[0]["keeps"]


def test_the_auroc_is_that_of_the_likelihood() -> None:
    seed = seed_of((0.5, 4.0), 0.5, 4.0)
    seed["hybrid"]["auroc"] = {"svhn": {"likelihood": 0.60, "typicality": 0.9}}
    seed["generative"]["auroc"] = {"svhn": {"likelihood": 0.63, "typicality": 0.2}}
    verdict = judge([seed], ["svhn"])[-1]
    assert (verdict["measure"], verdict["set"]) == ("auroc", "svhn")
    assert verdict["short"] == pytest.approx(0.03)
    assert not verdict["keeps"]


def test_verdicts_in_words() -> None:
    seed = seed_of((0.52, 4.02), 0.5, 4.0)
    for name in ("hybrid", "generative"):
        seed[name]["auroc"] = {"svhn": {"likelihood": 0.2}, "noise": {"likelihood": 0.9}}
    results = {
        "sets": ["noise", "svhn"], "set_sizes": {"noise": 1200, "svhn": 9},
        "seeds": [{"seed": 0, "networks": seed}], "verdicts": judge([seed], ["noise", "svhn"]),
    }  # fmt: skip
    lines = list(report.verdicts(results))
    pairs = "'contrastive, on the hybrid's pairs'"
    assert f"- The hybrid keeps the probe accuracy of {pairs}: ahead by 2.0 points." in lines
    assert (
        "- The hybrid keeps the bits per pixel of 'generative': short by 0.020, 0.030 allowed."
    ) in lines
    assert (
        "- The hybrid keeps the AUROC of the likelihood on noise, N = 1,200, of 'generative': "
        "short by 0.0 points, 2.0 points allowed."
    ) in lines
    assert lines[-1].startswith("Neither network's likelihood tells svhn from the test images")


def test_a_seed_that_is_not_done_gives_no_verdict() -> None:
    assert judge([], ["svhn"]) == []
    half = {"hybrid": {"accuracy": 0.5, "auroc": {}}}
    assert judge([seed_of((0.5, 4.0), 0.5, 4.0), half], []) == []


def test_flops_by_hand() -> None:
    model = ModelConfig(
        grid=(2, 3), colors=5, width=4, heads=2, outer_layers=2, inner_layers=1, mlp_ratio=4
    )
    linear = 2 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4)  # qkv, merge, two of the MLP
    rows, columns = (linear + 2 * 2 * 4 * length for length in (3, 2))  # scores and sums
    encoder, decoder = 6 * (rows + columns), 6 * (rows + 2 * 4 * 5)
    assert training_flops(model, 2, generates=True) == 3 * (2 * encoder + decoder)
    assert training_flops(model, 1, generates=False) == 3 * encoder


def test_seconds_are_those_of_the_records(tmp_path: Path) -> None:
    records = [(10, 5.0), (40, 10.0), (60, 4.0)]
    lines = [
        json.dumps({"step": i, "images": i, "images_per_second": s, "loss": None})
        for i, s in records
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert training_seconds(tmp_path) == pytest.approx(2 + 3 + 5)


def test_a_decoder_that_was_not_trained_has_no_likelihood() -> None:
    scores = {"likelihood": {"auroc": 0.9}, "compressed size": {"auroc": 0.6}}
    parts = {
        "classification": {"not_measured": "no labels"},
        "likelihood": {"bits_per_pixel": 4.0, "test_images": 9},
        "ood": {"sets": {"svhn": {"images": 7, "scores": scores}}},
    }
    assert summarise(parts, generates=False) == {
        "test_images": 9,
        "auroc": {"svhn": {"compressed size": 0.6}}, "ood_images": {"svhn": 7},
    }  # fmt: skip
    assert summarise(parts, generates=True)["bits_per_pixel"] == 4.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--alpha 0", "alpha: expected more than 0, as the hybrid has both losses"),
        ("--beta 0", "beta: expected more than 0, as the hybrid has both losses"),
        ("--seeds 1 1", "seeds: expected different ones, got [1, 1]"),
        ("--seeds -1", "seeds: expected at least 0"),
        ("--train-images 0", "train_images: expected at least 1, got 0"),
        ("--test-images 0", "test_images: expected at least 1, got 0"),
        ("--device cuda:99", "device: 'cuda:99' was asked for, but PyTorch sees"),
        ("--ood nowhere", "nowhere: no such file or folder"),
        ("--two-strong", "two_strong: expected false with alpha above 0"),
    ],
)
def test_what_is_no_study(
    words: str, message: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_study_runs_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process: call `gcrl study` without torchrun"):
        study_of(tmp_path).conduct()
    assert not (tmp_path / "study").exists()


def test_another_configuration_does_not_go_on(place: Path, results: dict[str, Any]) -> None:
    study = study_of(place, (0, 3))
    other = replace(study.config, optim=replace(study.config.optim, learning_rate=0.1))
    with pytest.raises(ConfigError, match=r"learning_rate was 0.002, now 0.1"):
        replace(study, config=other).conduct()
    assert load(place / "study" / "seed-3" / "simclr").config.views.two_strong
