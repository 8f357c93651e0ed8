"""Breaks trainings and their files at random: `python -m tests.faults --trials 200 --seed 0`.

After each trial the run goes on to the same weights, bit by bit, as one that nothing happened to,
or an error of ours says what is wrong. Anything else is a failure; the exit code says whether there
was one.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent))

from tiny_run import CONFIG

from gcrl import checkpoint
from gcrl.config import Config, ConfigError
from gcrl.data import DataError
from gcrl.trainer import train

OURS = (ConfigError, DataError, checkpoint.CheckpointError)
STEPS, EVERY = 12, 3
RUN = replace(
    CONFIG,
    optim=replace(CONFIG.optim, steps=STEPS, warmup_steps=1),
    evaluation=replace(CONFIG.evaluation, evaluate=False),
    runtime=replace(CONFIG.runtime, device="cpu", log_every=2, checkpoint_every=EVERY),
)


class Trials:
    """A run that nothing happened to, in a folder that holds every trial."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.whole = folder / "whole"
        torch.set_num_threads(1)
        train(RUN, self.whole, progress=False)

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder)) / "run"

    def half(self) -> Path:
        """A copy of the run, some steps before its end."""
        run = self.fresh()
        shutil.copytree(self.whole, run)
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
        return run

    def check_resumes(self, run: Path) -> None:
        if run.exists() and (run / "config.json").exists():
            train(Config.load(run / "config.json"), run, resume=True, progress=False)
        else:  # it had not begun
            shutil.rmtree(run, ignore_errors=True)
            train(RUN, run, progress=False)
        for name in ("model", "ema", "optimizer"):
            file = f"checkpoints/step-{STEPS:08d}/{name}.safetensors"
            assert (run / file).read_bytes() == (self.whole / file).read_bytes(), f"other {name}"
        left = [path.name for path in run.rglob(".*") if path.name != ".lock"]
        assert not left, f"left over: {left}"

    def signalled(self) -> None:
        """SIGKILL or SIGTERM at any moment."""
        run, number = self.fresh(), self.random.choice([signal.SIGKILL, signal.SIGTERM])
        process = start(run)
        deadline = time.monotonic() + 4 * self.random.random() + 2
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate()
        self.check_resumes(run)

    def failing_system(self) -> None:
        """An error of the operating system at any of the calls that write."""
        run = self.fresh()
        name = self.random.choice(
            ["os.fsync", "os.replace", "pathlib.Path.rename", "shutil.rmtree"]
        )
        code = self.random.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT])
        with failing(name, self.random.randrange(12), code), suppress(OSError):
            train(RUN, run, progress=False)
        self.check_resumes(run)

    def flipped_bit(self) -> None:
        """One bit of one file."""
        run = self.half()
        files = [path for path in run.rglob("*") if path.is_file() and path.stat().st_size]
        path = self.random.choice([file for file in files if "tensorboard" not in file.parts])
        content = bytearray(path.read_bytes())
        bit = self.random.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with suppress(OURS):
            self.check_resumes(run)

    def cut_file(self) -> None:
        """One file that ends early."""
        run = self.half()
        files = [path for path in run.rglob("*") if path.is_file() and path.stat().st_size]
        path = self.random.choice([file for file in files if "tensorboard" not in file.parts])
        os.truncate(path, self.random.randrange(path.stat().st_size))
        with suppress(OURS):
            self.check_resumes(run)

    def different_ranks(self) -> None:
        """Two processes that were started with another setting each."""
        name, value = self.random.choice([
            ("steps", 9), ("batch-size", 2), ("learning-rate", 0.5), ("seed", 4), ("clip", 0.5),
            ("accumulate", 2), ("alpha", 0.25), ("beta", 0.5), ("ema", 0.5), ("temperature", 0.9),
            ("checkpoint-every", 2), ("log-every", 5), ("precision", "bfloat16"),
        ])  # fmt: skip
        run, port = self.fresh(), 20_000 + self.random.randrange(20_000)
        processes = [start(run, rank, port, *[f"--{name}={value}"] * rank) for rank in range(2)]
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 2, errors
            assert f"{name.replace('-', '_')}: " in errors, errors
            assert "Traceback" not in errors, errors


def start(run: Path, rank: int | None = None, port: int = 0, *flags: str) -> subprocess.Popen[str]:
    file = run.with_suffix(".json")
    file.write_text(RUN.to_json())
    place = {}
    if rank is not None:
        place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-m", "gcrl", "train", f"--config={file}", f"--out={run}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **place}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


@contextmanager
def failing(name: str, calls: int, code: int) -> Iterator[None]:
    """The function of that name raises OSError once, after so many calls."""
    left = [calls]
    module, _, attribute = name.rpartition(".")
    owner = {"os": os, "shutil": shutil, "pathlib.Path": Path}[module]
    original = getattr(owner, attribute)

    def call(*arguments: object, **options: object) -> object:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    with mock.patch.object(owner, attribute, call):
        yield


QUICK = ("failing_system", "flipped_bit", "cut_file")
ALL = (*QUICK, "signalled", "different_ranks")


def run_trials(count: int, seed: int, names: tuple[str, ...] = ALL) -> list[str]:
    """Those that failed, in words."""
    failures, done = [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), seed)
        for number in tqdm(range(count), "trials", disable=not sys.stderr.isatty()):
            name = names[number % len(names)]
            trial: Callable[[], None] = getattr(trials, name)
            done[name] += 1
            try:
                trial()
            except Exception as error:
                failures.append(f"{name}, trial {number}: {type(error).__name__}: {error}")
                print(failures[-1], file=sys.stderr)
    print(", ".join(f"{name}: {n}" for name, n in done.items()) + f"; {len(failures)} failures")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=ALL, default=ALL)
    given = parser.parse_args()
    sys.exit(bool(run_trials(given.trials, given.seed, tuple(given.only))))
