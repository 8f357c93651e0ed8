"""Training: what a step is, what a run leaves, and going on after every kind of end."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from limits import HANG, until_hang
from torch import Tensor, nn

from gcrl import checkpoint, trainer
from gcrl.config import Config, ConfigError
from gcrl.data import DataError
from gcrl.distributed import Team
from gcrl.metrics import Recorder
from gcrl.palette import save_palette
from gcrl.runfolder import prepare
from gcrl.trainer import Diverged, Trainer, learning_rate, multiplies_bfloat16, train

STEPS = 60
TINY: dict[str, Any] = {
    "grid": [8, 8], "colors": 8, "width": 8, "heads": 2, "outer_layers": 2, "inner_layers": 1,
    "mlp_ratio": 1, "projection_dim": 4, "weak_shift": 1, "batch_size": 16, "steps": STEPS,
    "warmup_steps": 5, "log_every": 7, "checkpoint_every": 10, "evaluate": False, "device": "cpu",
    "precision": "float32",
}  # fmt: skip


def tiny(**flat: Any) -> Config:
    values = Config().to_dict()
    for name, value in {**TINY, **flat}.items():
        group = next(g for g in values.values() if isinstance(g, dict) and name in g)
        group[name] = value
    return Config.from_dict(values)


def make(folder: Path, team: Team | None = None, **flat: Any) -> Trainer:
    config, team = tiny(**flat), team or Team(torch.device("cpu"))
    return Trainer(config, *prepare(config, folder, team, progress=False), team)


def weights(folder: Path, name: str = "model") -> bytes:
    saved = checkpoint.latest(folder)
    assert saved is not None
    return (saved / f"{name}.safetensors").read_bytes()


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{**record, "images_per_second": None} for record in records(folder)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are started here, whose weights are compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(), folder, progress=False)
    return folder


def start(folder: Path, **flat: Any) -> subprocess.Popen[str]:
    """Begin the tiny run in a process of its own."""
    file = folder.with_suffix(".json")
    file.write_text(tiny(**flat).to_json())
    return subprocess.Popen(
        [sys.executable, "-m", "gcrl", "train", "--config", str(file), "--out", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    for _ in until_hang():
        if checkpoint.latest(folder) is not None:
            return
        assert process.poll() is None


def test_a_run_leaves_metrics_and_learns(whole: Path) -> None:
    rows = records(whole)
    assert [row["step"] for row in rows] == [1, *range(7, STEPS, 7), STEPS]
    assert rows[-1]["images"] == 16 * STEPS
    assert rows[0]["nats_per_pixel"] == pytest.approx(math.log(8), abs=0.05)
    assert rows[-1]["nats_per_pixel"] < rows[0]["nats_per_pixel"] - 0.1
    for row in rows:
        assert row["nats_per_image"] == pytest.approx(64 * row["nats_per_pixel"])
        assert row["bits_per_pixel"] == pytest.approx(row["nats_per_pixel"] / math.log(2))
        assert row["loss"] == pytest.approx(row["nats_per_pixel"] + row["contrastive"], rel=1e-5)
    assert Config.load(whole / "config.json") == tiny()
    assert list((whole / "tensorboard").iterdir())


def test_the_progress_bar_shows_losses_and_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(steps=3), tmp_path / "shown", progress=True)
    bar = capsys.readouterr().err.split("\r")[-1]
    last = records(tmp_path / "shown")[-1]
    assert "train: 100%" in bar
    assert "3/3" in bar
    assert f"nats/pixel={last['nats_per_pixel']:.3f}" in bar
    assert f"NT-Xent={last['contrastive']:.3f}" in bar
    assert f"images/s={last['images_per_second']:.0f}" in bar
    train(tiny(steps=1), tmp_path / "quiet", progress=False)
    assert not capsys.readouterr().err


def test_the_speed_is_that_of_the_steps(tmp_path: Path, monkeypatch) -> None:
    saves = []
    monkeypatch.setattr(Trainer, "save", lambda *_: saves.append(1e6))  # the seconds that it takes
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(saves))
    monkeypatch.setattr(trainer, "time", clock)
    config = tiny(steps=5, log_every=2, checkpoint_every=1, evaluate=False)
    train(config, tmp_path / "run", progress=False)
    images = 2 * config.optim.batch_size  # in two steps, which took 2e6 seconds with their saving
    assert records(tmp_path / "run")[-2]["images_per_second"] > images / 1e6


def test_the_same_run_again_is_the_same_bitwise(whole: Path, tmp_path: Path) -> None:
    train(Config.load(whole / "config.json"), tmp_path, progress=False)
    assert weights(tmp_path) == weights(whole)
    assert weights(tmp_path, "ema") == weights(whole, "ema")
    train(tiny(seed=1), tmp_path / "other", progress=False)
    assert weights(tmp_path / "other") != weights(whole)


def test_killed_in_mid_run_it_goes_on_to_the_same_weights(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_checkpoint(folder, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = checkpoint.latest(folder)
    assert saved is not None
    assert checkpoint.load_state(saved)["step"] < STEPS
    with open(folder / "metrics.jsonl", "a") as file:  # as if killed later, in mid-record
        file.write(json.dumps({"step": STEPS - 1}) + '\n{"step": 5')
    train(tiny(), folder, resume=True, progress=False)
    assert weights(folder) == weights(whole)
    assert weights(folder, "ema") == weights(whole, "ema")
    assert without_times(folder) == without_times(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = start(folder, checkpoint_every=5)
    wait_for_checkpoint(folder, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 128 + number
    saved = checkpoint.latest(folder)
    assert saved is not None
    step = checkpoint.load_state(saved)["step"]
    assert f"{number.name}: saved step {step}; go on with: gcrl train --resume" in errors
    assert "Traceback" not in errors
    train(tiny(), folder, resume=True, progress=False)
    assert weights(folder) == weights(whole)
    assert without_times(folder) == without_times(whole)


def test_a_signal_between_records_and_checkpoints(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def interrupt(self: Trainer) -> None:
        advance(self)
        if self.step == 24:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupt)
        with pytest.raises(trainer.Interrupted, match="saved step 24"):
            train(tiny(), tmp_path, progress=False)
    assert [row["step"] for row in records(tmp_path)] == [1, 7, 14, 21]
    train(tiny(), tmp_path, resume=True, progress=False)
    assert weights(tmp_path) == weights(whole)
    assert without_times(tmp_path) == without_times(whole)  # means over 22..28 too
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_folder_that_holds_a_run(whole: Path, tmp_path: Path) -> None:
    before = weights(whole)
    with pytest.raises(ConfigError, match="holds a run already: .*--resume.*--out"):
        train(tiny(), whole, progress=False)
    with pytest.raises(ConfigError) as raised:
        train(tiny(learning_rate=0.5, colors=9, log_every=3), whole, resume=True, progress=False)
    assert "colors was 8, now 9; learning_rate was 0.002, now 0.5" in str(raised.value)
    assert "log_every" not in str(raised.value)
    train(tiny(log_every=3, probe_test=5), whole, resume=True, progress=False)  # nothing to do
    train(tiny(), whole, resume=True, progress=False)
    assert weights(whole) == before
    with pytest.raises(ConfigError, match="holds no run to go on with"):
        train(tiny(), tmp_path / "none", resume=True, progress=False)


def test_other_images_are_not_gone_on_with(whole: Path, tmp_path: Path) -> None:
    run = make(tmp_path)
    run.fingerprint = "other"
    saved = checkpoint.latest(whole)
    assert saved is not None
    with pytest.raises(checkpoint.CheckpointError, match="training images were .* now other"):
        run.restore(saved)
    four = make(tmp_path, Team(torch.device("cpu"), rank=0, size=4))
    with pytest.raises(checkpoint.CheckpointError, match="processes were 1, now 4"):
        four.restore(saved)


def test_a_damaged_checkpoint_stops_the_resume(tmp_path: Path) -> None:
    train(tiny(steps=2), tmp_path, progress=False)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    (saved / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="step-00000002/optimizer.safetensors"):
        train(tiny(steps=2), tmp_path, resume=True, progress=False)


def test_divergence_names_the_step_and_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Trainer.backward

    def poison(self: Trainer, part: int) -> Tensor:
        losses = backward(self, part)
        return losses * math.nan if self.step == 12 else losses

    monkeypatch.setattr(Trainer, "backward", poison)
    with pytest.raises(Diverged, match=r"step 13: .*last good checkpoint is .*step-00000010$"):
        train(tiny(log_every=100, checkpoint_every=10), tmp_path, progress=False)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-00000010"]
    assert [row["step"] for row in records(tmp_path)] == [1]


def test_real_divergence_before_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="no checkpoint was saved before"):
        train(tiny(learning_rate=1e30, warmup_steps=0), tmp_path, progress=False)
    assert checkpoint.latest(tmp_path) is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.step = 3
    run.save(tmp_path, Recorder(tmp_path, 0))
    run.step = 4
    run.model.embed.weight.data[0, 0] = math.inf
    with pytest.raises(Diverged, match="step 4: .*step-00000003"):
        run.save(tmp_path, Recorder(tmp_path, 0))
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.name == "step-00000003"


def test_unusable_settings_leave_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DataError, match="batch_size: expected at most the 5752 .*got 5753"):
        train(tiny(batch_size=5753), folder, progress=False)
    with pytest.raises(DataError, match="no such file"):
        train(tiny(data=str(tmp_path / "none")), folder, progress=False)
    with pytest.raises(ConfigError, match="palette: .*none.npy"):
        train(tiny(palette=str(tmp_path / "none.npy")), folder, progress=False)
    with pytest.raises(ConfigError, match="device: "):
        train(tiny(device="cuda:99"), folder, progress=False)
    assert not folder.exists()


def test_the_palette_must_have_the_colours(whole: Path, tmp_path: Path) -> None:
    path = str(whole / "palette.npy")
    with pytest.raises(ConfigError, match="palette: expected 9 colours.*got 8"):
        train(tiny(palette=path, colors=9), tmp_path / "run", progress=False)
    given = make(tmp_path / "given", palette=path, seed=5)
    assert torch.equal(given.palette, make(whole).palette)


def test_a_palette_that_lies_there_is_taken_only_to_go_on(whole: Path, tmp_path: Path) -> None:
    fitted, other = make(whole).palette, torch.rand(8, 3) * 255
    given: dict[str, Any] = {"palette": str(whole / "palette.npy"), "seed": 5}
    for name, settings in (("fit", {}), ("given", given)):
        folder = tmp_path / name
        save_palette(folder / "palette.npy", other)
        assert torch.equal(make(folder, **settings).palette, fitted)
        save_palette(folder / "palette.npy", other)
        assert torch.equal(make(folder, **settings).palette, other)  # beside config.json


@pytest.mark.parametrize("size", [1, 3])
def test_every_epoch_takes_each_image_once_in_its_own_order(tmp_path: Path, size: int) -> None:
    device = torch.device("cpu")
    team = [make(tmp_path, Team(device, rank, size), accumulate=2) for rank in range(size)]
    per_epoch = 5752 // (16 * size)
    drawn: list[Tensor] = []
    for number in range(2 * per_epoch):
        for run in team:
            run.step = number // 2
            drawn.append(run.batch(number % 2))
    first, second = torch.cat(drawn).chunk(2)
    for epoch in (first, second):
        assert len(epoch) == len(set(epoch.tolist())) == per_epoch * 16 * size
    assert not torch.equal(first, second)


def test_views_differ_between_steps_parts_and_ranks(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.batch = lambda part: torch.arange(16)  # type: ignore[method-assign]
    seen: list[Any] = []
    for step, part, rank in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        run.step, run.team = step, Team(torch.device("cpu"), rank)
        views, again = run.tokens(part), run.tokens(part)
        torch.testing.assert_close(views, again, rtol=0, atol=0)
        seen += views
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_accumulated_gradients_are_the_mean_of_the_parts(tmp_path: Path) -> None:
    run = make(tmp_path, accumulate=2)
    parts = []
    for part in range(2):
        run.model.zero_grad()
        losses = run.network(*run.tokens(part), run.config.objective)
        (losses.generative + losses.contrastive).backward()
        parts.append([gradient(p).clone() for p in run.model.parameters()])
    run.model.zero_grad()
    for part in range(2):
        run.backward(part)
    for parameter, one, other in zip(run.model.parameters(), *parts, strict=True):
        torch.testing.assert_close(parameter.grad, (one + other) / 2)


def test_weights_of_the_objective(tmp_path: Path) -> None:
    for name, key in (("alpha", "nats_per_pixel"), ("beta", "contrastive")):
        folder = tmp_path / name
        train(tiny(**{name: 0, "steps": 3}), folder, progress=False)
        assert all(row[key] is None and row["loss"] > 0 for row in records(folder))
    run = make(tmp_path, alpha=0.5, beta=3.0)
    generative, contrastive, loss = run.backward(0)
    assert loss == pytest.approx(0.5 * generative + 3 * contrastive)


def test_only_matrices_decay(tmp_path: Path) -> None:
    run = make(tmp_path, weight_decay=0.3)
    decays = {
        id(p): group["weight_decay"]
        for group in run.optimizer.param_groups
        for p in group["params"]
    }
    for parameter in run.model.parameters():
        assert decays.pop(id(parameter)) == (0.3 if parameter.ndim >= 2 else 0.0)
    assert not decays


def test_learning_rate() -> None:
    optim = tiny(learning_rate=2.0, warmup_steps=4, steps=12).optim
    assert [learning_rate(optim, step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(optim, 4) == 2.0
    assert learning_rate(optim, 8) == pytest.approx(1.0)
    assert learning_rate(optim, 12) == 0.0
    assert learning_rate(tiny(warmup_steps=9, steps=3).optim, 2) > 0


def test_clipping_and_averages(tmp_path: Path) -> None:
    run = make(tmp_path, clip=1e-3, ema=0.75)
    assert run.averages is not None
    before = {name: average.clone() for name, average in run.averages.items()}
    run.advance()
    norm = torch.stack([gradient(p).norm() for p in run.model.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert run.window.sums[3] > 1e-2  # what is recorded is the norm before
    for name, parameter in run.model.named_parameters():
        expected = 0.75 * before[name] + 0.25 * parameter
        torch.testing.assert_close(run.averages[name], expected)
    train(tiny(ema=0, steps=2), tmp_path / "none", progress=False)
    saved = checkpoint.latest(tmp_path / "none")
    assert saved is not None
    assert not (saved / "ema.safetensors").exists()


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_precision(tmp_path: Path, monkeypatch, has_bfloat16) -> None:
    monkeypatch.setattr("gcrl.trainer.multiplies_bfloat16", lambda device: has_bfloat16)
    single, auto, half = (
        make(tmp_path, precision=name).backward(0) for name in ("float32", "auto", "bfloat16")
    )
    assert not torch.equal(single, half)
    assert torch.equal(auto, half if has_bfloat16 else single)
    assert half.dtype == torch.float32
    torch.testing.assert_close(single, half, rtol=0.02, atol=0.02)


def test_which_devices_multiply_bfloat16() -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    expected = "avx512_bf16" in flags or "amx_bf16" in flags
    assert multiplies_bfloat16(torch.device("cpu")) == expected
    assert not multiplies_bfloat16(torch.device("meta"))


def test_compiled_training_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    plain, compiled = make(tmp_path), make(tmp_path, compile=True)
    assert compiled.network is not compiled.model
    torch.testing.assert_close(compiled.backward(0), plain.backward(0))
    for p, q in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


def test_the_kernels_train_as_the_reference_does(tmp_path: Path) -> None:
    """The default preset's first losses, of the best kernels here and of plain PyTorch."""
    losses = []
    for backend in (None, "reference"):
        values = Config().to_dict()
        values["optim"]["steps"] = 6
        values["evaluation"]["evaluate"] = False
        values["runtime"] |= {"backend": backend, "device": "cpu", "precision": "float32"}
        values["runtime"]["log_every"] = 1
        folder = tmp_path / str(backend)
        train(Config.from_dict(values), folder, progress=False)
        losses.append([record["loss"] for record in records(folder)])
    ours, plain = losses
    assert len(ours) == len(plain) == 6
    assert ours != plain  # it is other code
    assert ours == pytest.approx(plain, rel=1e-4)
