"""The commands of the README and the docs, as they stand and in their order, in one folder.

The trainings are made short; a study is only checked, and evaluations measure one part.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_gcrl_data_cifar10 import write_cifar10

from gcrl import trainer
from gcrl.cli import main
from gcrl.config import Config
from gcrl.evaluation import suite
from gcrl.study import report, runs

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/your_own_images.md")


def commands(page: str) -> list[str]:
    """Of its shell blocks, a line each, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines: list[str] = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                lines.append(shlex.join(words))
    return lines


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands name, and what `make train` has left; all is short."""
    rng = np.random.default_rng(0)
    for name in ("photos/cat", "photos/dog", "photos/frog", "textures"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    write_cifar10(tmp_path, per_batch=64)
    train = trainer.train

    def short(config: Config, folder: Path, **options: Any) -> None:
        optim = replace(config.optim, steps=1, batch_size=8, warmup_steps=0)
        model = replace(
            config.model, grid=(8, 8), colors=8, width=8, heads=2, outer_layers=2, inner_layers=1
        )
        evaluation = replace(config.evaluation, probe_train=20, probe_test=10, sample_count=2)
        runtime = replace(config.runtime, compile=False, device="cpu")
        changed = replace(config, model=model, optim=optim, evaluation=evaluation, runtime=runtime)
        train(changed, folder, **{**options, "progress": False})

    run_parts = suite.run_parts
    monkeypatch.setattr(trainer, "train", short)
    one = ("likelihood",)
    monkeypatch.setattr(suite, "run_parts", lambda s, _, **options: run_parts(s, one, **options))
    monkeypatch.setattr(runs.Study, "conduct", lambda study: study._check())
    monkeypatch.setattr(report, "table", lambda results: "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0  # `make train`
    done: list[str] = []
    for page in PAGES:
        if done:  # another reader, who has the pictures alone
            shutil.rmtree("runs/photos")
        for command in commands(page):
            words = shlex.split(command)
            if words[0] == "torchrun":
                words = words[words.index("--no-python") + 1 :]
            if words[0] == "gcrl":
                assert main(words[1:]) == 0, (command, capfd.readouterr().err)
            elif words[0] == "make":
                subprocess.run([*words, "-n", "-C", ROOT], check=True, capture_output=True)
            else:
                assert command in ("pip install .", "source .venv/bin/activate"), command
            done.append(command)
    assert len([command for command in done if command.startswith("gcrl train")]) >= len(PAGES)
    for name in ("evaluation/results.md", "curves.png", "samples.png"):
        assert (place / "runs" / "photos" / name).exists()
