"""Several processes compute what one would on their joint batch."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limits import HANG, until_hang
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from gcrl import checkpoint
from gcrl.config import (
    Config,
    ConfigError,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RuntimeConfig,
)
from gcrl.distributed import Team, average_gradients, join
from gcrl.run import build_model
from gcrl.trainer import backward, compiled, train

RANKS, PARTS, BATCH = 2, 2, 6  # a batch of all processes
MODEL = ModelConfig(
    grid=(4, 4), colors=5, width=8, heads=2, outer_layers=2, inner_layers=1, projection_dim=4
)
OBJECTIVES = {
    "both": ObjectiveConfig(alpha=0.7, beta=1.3, score_first_pixel=False),
    "generative": ObjectiveConfig(beta=0),
    "contrastive": ObjectiveConfig(alpha=0),
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def tokens(part: int) -> tuple[Tensor, Tensor]:
    """Weak and strong views of a joint batch, [BATCH, 4, 4] each."""
    generator = torch.Generator().manual_seed(part)
    views = torch.randint(5, (2, BATCH, 4, 4), generator=generator)
    return views[0], views[1]


def gradients(
    team: Team, objective: ObjectiveConfig, *, compiles: bool = False
) -> dict[str, Tensor]:
    """Of a step of several batches; each process sees its slice of them."""
    config = Config(model=MODEL, objective=objective, runtime=RuntimeConfig(device="cpu"))
    model = build_model(config)
    network = compiled(model) if compiles else model
    mine = slice(team.rank * BATCH // team.size, (team.rank + 1) * BATCH // team.size)
    losses = []
    for part in range(PARTS):
        weak, strong = (view[mine] for view in tokens(part))
        losses.append(backward(network, weak, strong, objective, team.group, share=1 / PARTS))
    average_gradients(model, team)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "losses": team.mean(torch.stack(losses))}


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(RANKS),
        RANK=str(rank), LOCAL_RANK=str(rank),
    )  # fmt: skip
    torch.set_num_threads(1)
    with join(Config(runtime=RuntimeConfig(device="cpu")), {}) as team:
        found = {name: gradients(team, objective) for name, objective in OBJECTIVES.items()}
        torch.compile = functools.partial(torch.compile, backend="eager")  # no compiler needed
        for name, objective in OBJECTIVES.items():
            found[f"{name}, compiled"] = gradients(team, objective, compiles=True)
        assert torch._dynamo.utils.counters["frames"]["ok"]
        extremes = (team.largest(rank), -team.largest(-rank))
        mean = team.mean(torch.tensor([float(rank)]))
        torch.save(
            {**found, "team": (team.rank, team.size, *extremes, mean)}, f"{folder}/{rank}.pt"
        )
        team.wait()
    os._exit(0)  # gloo's threads may outlive the group and abort an interpreter that shuts down


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("how", ["", ", compiled"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_one_process(
    ranks: list[dict[str, Any]], name: str, how: str
) -> None:
    alone = gradients(Team(torch.device("cpu")), OBJECTIVES[name])
    for rank in ranks:
        found = rank[name + how]
        assert found.keys() == alone.keys()
        for key, expected in alone.items():
            torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6, msg=key)
    assert sum(g.norm() for g in alone.values()) > 0.1


def test_a_team_agrees(ranks: list[dict[str, Any]]) -> None:
    teams = [found["team"] for found in ranks]
    assert [team[:4] for team in teams] == [(0, 2, 1, 0), (1, 2, 1, 0)]
    assert all(team[4] == 0.5 for team in teams)


def test_one_process_needs_no_group() -> None:
    with join(Config(runtime=RuntimeConfig(device="cpu")), {}) as team:
        assert team == Team(torch.device("cpu"))
        assert team.leads
        assert team.largest(3) == 3
        team.wait()


def test_processes_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "device: 2 processes take a GPU each.*got 'cuda:0'"
    config = Config(runtime=RuntimeConfig(device="cuda:0"))
    with pytest.raises(ConfigError, match=message), join(config, {}):
        pass


def small(steps: int, every: int) -> Config:
    """A run on the digits, with records and checkpoints every so many steps."""
    config = Config(model=replace(MODEL, grid=(8, 8)))
    return replace(
        config,
        optim=OptimConfig(batch_size=8, accumulate=2, steps=steps, warmup_steps=1),
        runtime=RuntimeConfig(device="cpu", checkpoint_every=every, log_every=every),
        evaluation=replace(config.evaluation, evaluate=False),
    )


def torchrun(folder: Path, config: Config, *flags: str, ranks: int = 2) -> subprocess.Popen[str]:
    """Begin to train on several processes."""
    file = folder.with_suffix(".json")
    file.write_text(config.to_json())
    words = ["-m", "gcrl", "train", f"--config={file}", f"--out={folder}", *flags]
    return subprocess.Popen(
        [*TORCHRUN, str(ranks), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_torchrun_trains_and_resumes(tmp_path: Path) -> None:
    config = small(steps=4, every=2)

    def run(folder: Path, *flags: str) -> None:
        process = torchrun(folder, config, *flags)
        _, errors = process.communicate(timeout=HANG)
        assert process.returncode == 0, errors
        assert "FutureWarning" not in errors

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(whole)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 4]
    assert records[-1]["images"] == 4 * 2 * 2 * 8
    last = checkpoint.latest(whole)
    assert last is not None
    assert checkpoint.load_state(last)["processes"] == 2

    earlier = whole / "checkpoints" / "step-00000002"
    (halves / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "palette.npy"):
        (whole / name).rename(halves / name)
    earlier.rename(halves / "checkpoints" / earlier.name)
    run(halves, "--resume")
    again = checkpoint.latest(halves)
    assert again is not None
    assert again.name == last.name
    for name in ("model", "ema", "optimizer"):
        file = f"{name}.safetensors"
        assert (again / file).read_bytes() == (last / file).read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="processes were 2, now 1"):
        train(config, halves, resume=True, progress=False)


def test_a_signal_to_torchrun_saves_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = torchrun(folder, small(steps=5000, every=5000))
    metrics = folder / "metrics.jsonl"
    for _ in until_hang():
        if metrics.exists() and metrics.read_text():  # the first step's record
            break
        assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode != 0
    saved = checkpoint.latest(folder)
    assert saved is not None
    step = checkpoint.load_state(saved)["step"]
    assert step < 5000
    assert f"SIGTERM: saved step {step}; go on with: gcrl train --resume" in errors


@pytest.mark.parametrize("ranks", [3])
def test_any_number_of_processes_resumes_bitwise(tmp_path: Path, ranks: int) -> None:
    config, whole, halves = small(steps=4, every=2), tmp_path / "whole", tmp_path / "halves"
    assert_success(torchrun(whole, config, ranks=ranks))
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "step-00000004")
    assert_success(torchrun(halves, config, "--resume", ranks=ranks))
    for name in ("model", "ema", "optimizer"):
        file = f"checkpoints/step-00000004/{name}.safetensors"
        assert (whole / file).read_bytes() == (halves / file).read_bytes()


# Each is given to the second process alone.
DIFFERENCES = {
    "batch_size": "--batch-size=4",
    "accumulate": "--accumulate=1",
    "seed": "--seed=5",
    "learning_rate": "--learning-rate=0.01",
    "alpha": "--alpha=0.5",
    "temperature": "--temperature=0.3",
    "steps": "--steps=3",
    "ema": "--ema=0.5",
    "clip": "--clip=2",
    "precision": "--precision=bfloat16",
    "checkpoint_every": "--checkpoint-every=1",
    "evaluate": "--evaluate",
}


def test_processes_that_were_started_differently_say_so(tmp_path: Path) -> None:
    """All differences at once, each named with its ranks, on every process."""
    config = small(steps=2, every=2)
    errors = [process.communicate()[1] for process in started_by_hand(tmp_path, config)]
    for text in errors:
        assert "gcrl: the processes of the run were started differently: " in text, text
        for name in DIFFERENCES:
            assert re.search(rf"\b{name}: \S+ on rank 0, \S+ on rank 1", text), (name, text)
    assert not (tmp_path / "run").exists()


def test_processes_with_other_images_say_so(tmp_path: Path) -> None:
    config = small(steps=2, every=2)
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    for rank in range(2):
        np.savez(tmp_path / f"{rank}.npz", images=images + np.uint8(rank))
    flags = [[f"--data={tmp_path / f'{rank}.npz'}"] for rank in range(2)]
    processes = started_by_hand(tmp_path, config, flags)
    for process in processes:
        _, text = process.communicate()
        assert process.returncode == 2
        assert re.search(r"training images: '\w+' on rank 0, '\w+' on rank 1", text), text


def started_by_hand(
    folder: Path, config: Config, flags: list[list[str]] | None = None
) -> list[subprocess.Popen[str]]:
    """Two processes of a run, each with flags of its own."""
    (folder / "config.json").write_text(config.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = flags or [[], list(DIFFERENCES.values())]
    words = [sys.executable, "-m", "gcrl", "train", f"--config={folder / 'config.json'}"]
    words.append(f"--out={folder / 'run'}")
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank, own in enumerate(flags):
        place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = {**os.environ, **common, **place}
        processes.append(
            subprocess.Popen([*words, *own], env=environment, stderr=subprocess.PIPE, text=True)
        )
    return processes


def assert_success(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors
