"""The command line, as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from limits import HANG
from PIL import Image

from gcrl.cli import main
from gcrl.config import Config
from gcrl.presets import PRESETS, preset

TINY = """
    --grid 8 8 --colors 8 --width 8 --heads 2 --outer-layers 2 --inner-layers 1 --weak-shift 1
    --batch-size 16 --steps 4 --warmup-steps 1 --log-every 2 --device cpu --probe-train 60
    --probe-test 30 --neighbors 5 --sample-count 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *TINY.split(), "--out", str(folder), "--learning-rate", "0.003"]) == 0
    return folder


def settings_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[Config, Path, bool]:
    """What `gcrl train` would train, where, and whether it would resume."""
    calls: list[tuple[Config, Path, bool]] = []

    def record(config: Config, folder: Path, *, resume: bool) -> None:
        calls.append((config, folder, resume))

    monkeypatch.setattr("gcrl.trainer.train", record)
    assert main(["train", *words]) == 0
    return calls[0]


@pytest.mark.parametrize(
    "command", [[], ["train"], ["evaluate"], ["study"], ["sample"], ["palette"]]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    if command == ["train"]:
        for name in Config().flat():
            assert f"--{name.replace('_', '-')}" in text
        assert "Encoder blocks, alternately along rows" in text


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom gcrl.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG
    )
    assert "torch" not in done.stdout.split()
    assert "{train,evaluate" in done.stdout


@pytest.mark.parametrize("name", PRESETS)
def test_flags_change_a_preset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    words = ["--preset", name, "--steps", "7", "--flip", "--crop-scale", "0.5", "0.75"]
    config, folder, resume = settings_of(monkeypatch, *words)
    expected = preset(name).to_dict()
    expected["optim"]["steps"] = 7
    expected["views"].update(flip=True, crop_scale=(0.5, 0.75))
    assert config == Config.from_dict(expected)
    assert folder == Path("runs") / name
    assert not resume


def test_train_alone_is_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(monkeypatch) == (PRESETS["digits"], Path("runs/digits"), False)


def test_config_and_resume_start_from_a_run(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    saved = Config.load(run / "config.json")
    config, *_ = settings_of(monkeypatch, f"--config={run / 'config.json'}", "--steps", "9")
    assert config.optim.steps == 9
    assert config.optim.learning_rate == 0.003
    assert settings_of(monkeypatch, "--resume", "--out", str(run)) == (saved, run, True)


def test_a_run_is_trained_and_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "palette.npy", "curves.png", "samples.png", "results.md"):
        assert (run / name).stat().st_size > 0
    results = json.loads((run / "results.json").read_text())
    capsys.readouterr()
    words = ["evaluate", str(run), "--device", "cpu", "--parts", "summary", "likelihood"]
    assert main(words) == 0
    measured = capsys.readouterr()
    assert "linear probe" in measured.out
    assert "summary (1 of 2)" in measured.err
    assert json.loads((run / "evaluation" / "results.json").read_text())["summary"] == results
    assert main(words) == 0
    again = capsys.readouterr()
    assert again.out == measured.out
    assert again.err.count("kept from before") == 2
    assert main(["train", "--resume", "--out", str(run)]) == 0  # evaluates again
    assert "linear probe" in capsys.readouterr().out


def test_a_run_on_files_serves_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    elsewhere.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(there / "noise.npz", images=images)
    np.save(there / "colors.npy", images[0, 0])
    monkeypatch.chdir(there)
    words = ["train", *TINY.split(), "--no-evaluate", "--data=noise.npz", "--palette=colors.npy"]
    assert main([*words, "--out=run"]) == 0
    assert main([*words, "--out=run", "--resume"]) == 0
    config = Config.load("run/config.json")
    assert config.data.data == str(there / "noise.npz")
    assert config.data.palette == str(there / "colors.npy")
    monkeypatch.chdir(elsewhere)
    assert main(["evaluate", "../there/run", "--device=cpu", "--parts", "likelihood"]) == 0
    assert main(["train", "--config=../there/run/config.json", "--out=again"]) == 0
    words[-2:] = ["--data=../there/noise.npz", "--palette=../there/colors.npy"]
    assert main([*words, "--out=../there/run", "--resume"]) == 0


def test_evaluate_on_other_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "results.json").read_text()
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=images)
    words = ["evaluate", str(run), "--data", str(tmp_path / "noise.npz"), "--parts", "likelihood"]
    assert main([*words, "--out", str(tmp_path / "results")]) == 0
    assert "nats per pixel" in capsys.readouterr().out
    assert (tmp_path / "results" / "results.json").exists()
    assert (run / "results.json").read_text() == before


def test_samples_and_completions(run: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.png" for name in "abc")
    for file, seed in ((first, "1"), (second, "1"), (third, "2")):
        assert main(["sample", str(run), "--count=4", "--seed", seed, "--out", str(file)]) == 0
    assert first.read_bytes() == second.read_bytes() != third.read_bytes()
    for source in (first, tmp_path, "digits"):
        out = tmp_path / "out" / "completed.png"
        assert main(["sample", str(run), "--complete", str(source), "--out", str(out)]) == 0
        assert Image.open(out).size[0] > 8
        out.unlink()


def test_palette(tmp_path: Path) -> None:
    out = tmp_path / "new" / "palette.npy"
    assert main(["palette", "digits", "--colors", "6", "--grid", "4", "4", "--out", str(out)]) == 0
    palette = np.load(out, allow_pickle=False)
    assert palette.shape == (6, 3)
    assert palette.dtype == np.float32
    assert len(np.unique(palette, axis=0)) == 6
    assert 1 < palette.max() <= 255
    assert out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --preset cifar10-small", "'cifar10-small' needs images: pass --data"),
        ("train --data none", "none: no such file or folder"),
        ("train --heads 5", "heads: expected a divisor of the width, 96, got 5"),
        ("train --preset digits --config c.json", "expected one of them, got both"),
        ("train --config none.json", "none.json: cannot be read"),
        ("train --resume --out none", "none holds no run to go on with"),
        ("train --backend triton --device cpu", "backend 'triton' cannot run"),
        ("train --device cuda:99", "device: 'cuda:99' was asked for"),
        ("evaluate none", "none is not the folder of a run"),
        ("evaluate none --parts flying", "parts: expected some of summary, classification"),
        ("evaluate none --ood nowhere", "nowhere: no such file or folder"),
        ("evaluate none --draws 0", "draws: expected at least 1, got 0"),
        ("evaluate none --finetuning-rate 0", "finetuning_rate: expected a number above 0"),
        ("sample none", "none is not the folder of a run"),
        ("sample none --count 0", "count: expected more than 0, got 0"),
        ("palette none --out p.npy", "none: no such file or folder"),
        ("palette digits --out p.png", "expected a file that ends in .npy, got p.png"),
        ("palette digits --colors 1 --out p.npy", "expected at least 2 colours"),
        ("palette digits --colors 99999 --grid 4 4 --out p.npy", "colors: "),
        ("palette digits --seed -1 --out p.npy", "seed: expected at least 0 and below 2^63"),
        (f"sample none --seed {2**63}", "seed: expected at least 0 and below 2^63"),
    ],
)
def test_errors_are_one_line(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("gcrl: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_a_run_in_the_way(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--out", str(run), "--resume", "--learning-rate", "0.1"]) == 2
    assert "learning_rate was 0.003, now 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["train --stepps 3", "train --steps x", "train --preset x", "fly"]
)
def test_words_that_are_no_command(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(words.split())
    assert done.value.code == 2
    assert capsys.readouterr().err
