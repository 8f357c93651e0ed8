"""A run's folder holds what the run left there, or an error of one line says what is not."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from test_gcrl_trainer import tiny, weights
from tiny_run import tiny_run

from gcrl import checkpoint, metrics
from gcrl.cli import main
from gcrl.config import Config, ConfigError
from gcrl.evaluation.store import Store
from gcrl.figures import draw_curves
from gcrl.lock import hold
from gcrl.run import load
from gcrl.trainer import train

STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(tiny(steps=STEPS, checkpoint_every=2), folder, progress=False)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a whole run, two steps before its end."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    return tmp_path / "run"


def edit(run: Path, change: Callable[[dict], None]) -> None:
    values = json.loads((run / "config.json").read_text())
    change(values)
    (run / "config.json").write_text(json.dumps(values))


def resume(run: Path) -> None:
    train(Config.load(run / "config.json"), run, resume=True, progress=False)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# One process at a time


def test_a_folder_in_use_names_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    owner = rf"in use by process {os.getpid()} on {socket.gethostname()}: .*--out"
    with hold(folder), pytest.raises(ConfigError, match=owner), hold(folder):
        pass
    assert list(tmp_path.iterdir()) == []  # nothing came of it
    with hold(folder):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_killed_owner_has_let_go(tmp_path: Path) -> None:
    words = "with hold(Path(sys.argv[1])): print('held', flush=True); input()"
    words = f"import sys; from pathlib import Path; from gcrl.lock import hold\n{words}"
    owner = subprocess.Popen(
        [sys.executable, "-c", words, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=f"in use by process {owner.pid} on"), hold(tmp_path):
        pass
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    with hold(tmp_path):
        pass


def test_of_two_trainings_one_begins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(tiny(steps=STEPS).to_json())
    words = [sys.executable, "-m", "gcrl", "train", f"--config={tmp_path / 'config.json'}"]
    words.append(f"--out={tmp_path / 'run'}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    assert "in use by" in errors[codes.index(2)] or "holds a run already" in errors[codes.index(2)]
    assert load(tmp_path / "run", device="cpu").step == STEPS


# What a checkpoint depends on


def test_every_bit_of_the_palette_matters(run: Path) -> None:
    palette = (run / "palette.npy").read_bytes()
    for bit in random.Random(0).sample(range(8 * 128, 8 * len(palette)), 12):
        flip(run / "palette.npy", bit)
        with pytest.raises((checkpoint.CheckpointError, ConfigError), match=r"palette"):
            resume(run)
        with pytest.raises((checkpoint.CheckpointError, ValueError), match=r"palette"):
            load(run, device="cpu")
        (run / "palette.npy").write_bytes(palette)
    resume(run)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("optim", "learning_rate", 0.5),
        ("optim", "batch_size", 8),
        ("model", "heads", 4),
        ("runtime", "precision", "bfloat16"),
        ("runtime", "seed", 3),
        ("objective", "beta", 0.25),
        ("views", "blur", 0.5),
    ],
)
def test_an_edited_configuration_is_named(run: Path, group: str, name: str, value) -> None:
    edit(run, lambda values: values[group].update({name: value}))
    with pytest.raises(checkpoint.CheckpointError, match=rf"{name} was .*, now {value!r}"):
        resume(run)


def test_what_may_be_changed(run: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run, lambda values: values["runtime"].update(log_every=1, checkpoint_every=3))
    edit(run, lambda values: values["evaluation"].update(probe_test=7))
    resume(run)
    assert weights(run) == weights(trained)
    assert "was" not in capsys.readouterr().err
    edit(run, lambda values: values["optim"].update(steps=STEPS + 2))
    resume(run)
    assert f"gcrl: steps was {STEPS}, now {STEPS + 2};" in capsys.readouterr().err
    assert load(run, device="cpu").step == STEPS + 2


def test_every_bit_of_a_checkpoints_state_matters(run: Path) -> None:
    saved = checkpoint.latest(run)
    assert saved is not None
    path, expected = saved / "state.json", checkpoint.load_state(saved)
    content = path.read_bytes()
    for bit in random.Random(1).sample(range(8 * len(content)), 400):
        flip(path, bit)
        with suppress(checkpoint.CheckpointError):
            assert checkpoint.load_state(saved) == expected
        path.write_bytes(content)


def test_a_state_without_its_window_is_damaged(run: Path) -> None:
    saved = checkpoint.latest(run)
    assert saved is not None
    state = checkpoint.load_state(saved)
    for window in (None, {}, {"sums": [1.0], "count": 1}, {"sums": "x", "count": 1}):
        changed = {**state, "window": window}
        changed[checkpoint.OWN_DIGEST] = checkpoint.digest_of(changed)
        (saved / "state.json").write_text(json.dumps(changed))
        with pytest.raises(checkpoint.CheckpointError, match="'window' of sums and a count"):
            resume(run)


def test_leftovers_go_at_the_next_start(run: Path, trained: Path) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / ".unfinished-step-00000003")
    for step in (0, 1):
        shutil.copytree(folder / "step-00000002", folder / f"step-0000000{step}")
    (run / ".palette.npy.123.tmp").touch()
    (run / ".config.json.tmp").touch()
    resume(run)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
    hidden = [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert hidden == []
    assert weights(run) == weights(trained)


# What is kept beside a run


def test_every_bit_of_a_store_matters(tmp_path: Path) -> None:
    store, array = Store(tmp_path), np.arange(40.0)
    assert np.array_equal(store.get("kind", [b"a"], lambda: array), array)
    path = store.path("kind", [b"a"])
    content = path.read_bytes()
    for bit in random.Random(2).sample(range(8 * len(content)), 300):
        flip(path, bit)
        assert np.array_equal(store.get("kind", [b"a"], lambda: array), array)
        assert path.read_bytes() == content
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert store.read(path) is None


def test_cut_metrics_end_where_they_are_cut(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) >= 2
    path.write_bytes(b"".join(lines)[:-9])
    assert [record["step"] for record in metrics.read(path)] == [
        json.loads(line)["step"] for line in lines[:-1]
    ]
    draw_curves(run)
    path.write_bytes(b'{"step": []}\n' + b"[" * 100_000)
    assert metrics.read(path) == []
    with pytest.raises(ConfigError, match=r"metrics.jsonl: expected at least one record"):
        draw_curves(run)


# Errors of one line


@pytest.mark.parametrize(
    "text",
    ["1" * 400, "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\xff", "null", "[]", "NaN", ""],
)
def test_no_text_is_a_configuration_by_chance(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="latin-1")
    assert main(["train", f"--config={file}", f"--out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gcrl: {file}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("optim", "learning_rate", 10**400),
        ("optim", "steps", 10**400),
        ("runtime", "seed", 10**30),
        ("data", "data", "~nouser/pictures"),
        ("data", "palette", "~nouser/palette.npy"),
    ],
)
def test_values_that_no_machine_has(
    run: Path, group: str, name: str, value, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, lambda values: values[group].update({name: value}))
    assert main(["train", "--resume", f"--out={run}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gcrl: ")
    assert error.count("\n") == 1
    assert name in error or "nouser" in error


def test_a_run_that_is_damaged_does_not_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(tmp_path)
    flip(tmp_path / "palette.npy", 8 * 140)
    assert main(["evaluate", str(tmp_path), "--device=cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gcrl: ")
    assert "palette" in error
    assert error.count("\n") == 1


def test_a_disk_without_room_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: the checkpoint's is larger."""
    (tmp_path / "config.json").write_text(tiny(steps=STEPS, checkpoint_every=2).to_json())
    words = [sys.executable, "-m", "gcrl", "train", f"--config={tmp_path / 'config.json'}"]
    limit = 3000
    done = subprocess.run(
        [*words, f"--out={tmp_path / 'run'}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception in thread" not in done.stderr
    assert "gcrl: [Errno 27] File too large" in done.stderr


def test_an_error_of_tensorboards_file_is_the_callers(tmp_path: Path) -> None:
    recorder = metrics.Recorder(tmp_path, 0)
    recorder.board.file.close()
    with pytest.raises((OSError, ValueError)):
        recorder.write({"step": 1, "loss": 1.0})
    recorder.close()
