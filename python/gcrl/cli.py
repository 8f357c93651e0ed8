"""The command line: `gcrl train | evaluate | study | sample | palette`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gcrl import memory
from gcrl.config import SEEDS, Config, ConfigError, DataConfig
from gcrl.evaluation import PARTS
from gcrl.evaluation.options import Options
from gcrl.paths import expand, expand_all, name_of
from gcrl.presets import PRESETS

if TYPE_CHECKING:
    import numpy as np

    from gcrl.run import Run


@dataclass(frozen=True)
class Train:
    """Train a GCRL and evaluate it; by default on handwritten digits, in minutes on a CPU.

    Every setting starts from the preset, from --config, or with --resume from the run itself.
    Several processes together: torchrun --nproc-per-node 8 --no-python gcrl train …
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder of the run; by default runs/PRESET, with --data alone runs/NAME of the data."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the newest checkpoint in --out."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Start from this configuration, such as RUN/config.json, and not from a preset."""

    def __call__(self) -> None:
        from gcrl.trainer import train

        folder = self.out or _default_folder("runs", self.settings)
        train(self.settings, folder, resume=self.resume)


@dataclass(frozen=True)
class Evaluate:
    """Measure what a run is good for, part by part.

    Each part leaves its numbers (.json), its table (.md) and its pictures (.png) as soon as it is
    done. Ctrl-C stops; the same command goes on, and keeps what follows from the same network,
    images and options. The parts:

    {parts}
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    parts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART …")] = ()
    """The parts to measure; by default all."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Other images to measure it on, as `gcrl train --data` takes them."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder for the results; by default RUN/evaluation, with --data RUN/evaluation-NAME."""
    again: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure anew what is there already; from the same features, which stay kept."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."""
    max_gigabytes: float | None = None
    """Memory that reading images may take, about; by default as in training."""
    measurement: Options = field(default_factory=Options)

    def __call__(self) -> None:
        from gcrl.data import load_dataset, memory_limit
        from gcrl.evaluation.subject import Subject
        from gcrl.evaluation.suite import choose_parts, run_parts, table

        self.measurement.validate()
        choose_parts(self.parts)
        run = _load(self.run, self.device)
        with memory_limit(_or_else(self.max_gigabytes, run.config.data.max_gigabytes)):
            dataset = load_dataset(self.data or run.config.data.data, run.config.model.grid)
            name = f"evaluation-{dataset.name}" if self.data else "evaluation"
            subject = Subject(run, dataset, self.out or self.run / name, self.measurement)
            results = run_parts(subject, self.parts, again=self.again)
        print("\n".join(table(part, measured) for part, measured in results.items()), end="")


Evaluate.__doc__ = (Evaluate.__doc__ or "").format(
    parts="\n\n    ".join(f"{name}: {what}." for name, what in PARTS.items())
)


@dataclass(frozen=True)
class Study:
    """Compare the hybrid with its parts: four trainings from the same start and data order.

    They are the hybrid; contrastive alone on its pairs (alpha 0); contrastive alone on two strong
    views, which is SimCLR; generative alone (beta 0). Beside them stand the untrained network and
    the same network trained with labels. The settings are the hybrid's, as for `gcrl train`.
    Stopped, the same command goes on. It leaves study.md, study.png and study.json.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder of the study; by default studies/PRESET, with --data alone studies/NAME of it."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Start from this configuration, such as RUN/config.json, and not from a preset."""
    seeds: tuple[int, ...] = ()
    """Seeds to repeat everything under; by default --seed alone."""
    train_images: int | None = None
    """Labelled training images to learn from, at most; by default --probe-train."""
    test_images: int | None = None
    """Test images to measure on, at most; by default --probe-test."""
    ood: tuple[str, ...] = ()
    """Images unlike the run's, to be told apart: .npz files or folders of images."""

    def __call__(self) -> None:
        from gcrl.data import memory_limit
        from gcrl.study import report, runs

        folder = self.out or _default_folder("studies", self.settings)
        seeds = self.seeds or (self.settings.runtime.seed,)
        options = Options(self.train_images, self.test_images, ood=self.ood)
        study = runs.Study(self.settings, folder, seeds, options)
        with memory_limit(self.settings.data.max_gigabytes):
            print(report.table(study.conduct()), end="")


@dataclass(frozen=True)
class Sample:
    """Draw images from a run, or complete given ones."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    count: int = 16
    """Images to draw, or to complete at most."""
    seed: int = 0
    """The same seed draws the same images."""
    temperature: float = 1.0
    """Below 1 the likely colours become likelier."""
    complete: Annotated[str | None, tyro.conf.arg(metavar="IMAGES")] = None
    """Draw the lower half of these anew: a picture, a folder of pictures, or the test images of
    what `gcrl train --data` takes. They are shown in pairs: as they are, and completed."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """The picture to write; by default RUN/generated.png or RUN/completed.png."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."""
    max_gigabytes: float | None = None
    """Memory that reading images may take, about; by default as in training."""

    def __call__(self) -> None:
        import torch

        from gcrl.data import memory_limit
        from gcrl.figures import save_images

        for name, value in (("count", self.count), ("temperature", self.temperature)):
            if not value > 0:
                raise ConfigError(f"{name}: expected more than 0, got {value}")
        _check_seed(self.seed)
        run = _load(self.run, self.device)
        options: dict[str, Any] = {
            "seed": self.seed,
            "temperature": self.temperature,
            "progress": True,
        }
        if self.complete is None:
            images = run.sample(self.count, **options)
        else:
            with memory_limit(_or_else(self.max_gigabytes, run.config.data.max_gigabytes)):
                given = _given_images(self.complete, run.config.model.grid)[: self.count]
            pair = (run.quantize(given), run.complete(given, **options))
            images = torch.cat(pair, 2)  # [N, H, 2W, 3]
        name = "generated.png" if self.complete is None else "completed.png"
        out = self.out or self.run / name
        out.parent.mkdir(parents=True, exist_ok=True)
        print(save_images(out, images))


@dataclass(frozen=True)
class Palette:
    """Fit a palette on the training images of a dataset, for `gcrl train --palette`."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The images, as `gcrl train --data` takes them."""
    out: Path
    """The .npy file to write; a picture of the colours is written beside it."""
    colors: int = 512
    """How many colours."""
    grid: tuple[int, int] = (32, 32)
    """Height and width that the images are brought to first."""
    seed: int = 0
    """Seed of the pixels and of k-means."""
    max_gigabytes: float = DataConfig.max_gigabytes
    """Memory that reading the images may take, about."""

    def __call__(self) -> None:
        from gcrl.data import load_dataset, memory_limit
        from gcrl.figures import save_images
        from gcrl.palette import fit, save_palette

        if self.out.suffix != ".npy":
            raise ConfigError(f"out: expected a file that ends in .npy, got {self.out}")
        if self.colors < 2 or min(self.grid) < 1:
            raise ConfigError(
                "colors, grid: expected at least 2 colours and 1x1 pixels, got "
                f"{self.colors} and {self.grid[0]}x{self.grid[1]}"
            )
        _check_seed(self.seed)
        with memory_limit(self.max_gigabytes):
            dataset = load_dataset(self.data, self.grid)
        try:
            palette = fit(dataset.train.images, self.colors, self.seed, progress=True)
        except ValueError as error:  # fewer pixels than colours
            raise ConfigError(f"colors: {error}") from error
        save_palette(self.out, palette)
        swatches = palette[palette.sum(1).argsort()].round().byte()[:, None, None]  # [K, 1, 1, 3]
        picture = save_images(self.out.with_suffix(".png"), swatches)
        print(self.out, picture, sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors that a user can mend are one line."""
    if arguments is None:  # the process is ours alone
        memory.keep_freed()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = tyro.cli(
            _commands(words),
            prog="gcrl",
            description="Hybrid generative-contrastive representation learning: one axial "
            "transformer predicts images pixel by pixel and contrasts two views of each.",
            args=words,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        expand_all(command)()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ConfigError, OSError) as error:
        return _fail(str(error), 2)
    except Exception as error:
        if not isinstance(error, _mendable()):
            raise
        return _fail(str(error), getattr(error, "exit_code", 2))
    return 0


def _commands(words: list[str]) -> Any:
    trains = words[:1] in (["train"], ["study"])
    settings = _starting_settings(words[1:]) if trains else PRESETS["digits"]
    return (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(settings))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Study, tyro.conf.subcommand("study", default=Study(settings))]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Palette, tyro.conf.subcommand("palette")]
    )


def _starting_settings(words: list[str]) -> Config:
    """What the flags of `gcrl train` change: a preset, a file, or the run that is resumed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--config", type=expand)
    parser.add_argument("--out", type=expand)
    parser.add_argument("--resume", action="store_true")
    try:
        given, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:
        return PRESETS["digits"]  # the whole parser says what is wrong
    if given.preset and given.config:
        raise ConfigError("preset, config: expected one of them, got both")
    if given.config:
        return Config.load(given.config)
    name = given.preset or ("digits" if given.data == "digits" else "pictures")
    settings = PRESETS.get(name, PRESETS["digits"])
    located = replace(settings, data=replace(settings.data, data=given.data))
    saved = (given.out or _default_folder("runs", located)) / "config.json"
    if given.resume and not given.preset and saved.exists():
        return Config.load(saved)
    return settings


def _default_folder(parent: str, settings: Config) -> Path:
    """Named by the preset, or by people's own pictures."""
    if settings.preset != "pictures" or not settings.data.data:
        return Path(parent) / settings.preset
    return Path(parent) / name_of(settings.data.data).removesuffix(".npz")


def _check_seed(seed: int) -> None:
    if seed not in SEEDS:
        raise ConfigError(f"seed: expected at least 0 and below 2^63, got {seed}")


def _or_else(value: float | None, default: float) -> float:
    return default if value is None else value


def _load(folder: Path, device: str) -> Run:
    from gcrl.run import load

    try:
        return load(folder, device=device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _given_images(source: str, grid: tuple[int, int]) -> np.ndarray:
    """uint8 [N, H, W, 3]: a picture, all pictures of a folder, or a dataset's test images."""
    from gcrl.data import folder, load_dataset

    path = expand(source)
    if path.is_dir():
        files = folder.pictures_in(path)
    else:
        files = [path] if path.suffix.lower() in folder.EXTENSIONS else []
    if not files:
        return load_dataset(source, grid).test.images
    return folder.read_images(files, grid, path)


def _mendable() -> tuple[type[Exception], ...]:
    """Errors whose message says all; imported only when something was raised."""
    from gcrl.checkpoint import CheckpointError
    from gcrl.data import DataError
    from gcrl.evaluation.suite import StoppedError
    from gcrl.interrupts import Interrupted
    from gcrl.probes import NotFiniteError
    from gcrl.trainer import Diverged
    from gcrl_kernels.backends import BackendUnavailableError

    mendable = (DataError, CheckpointError, BackendUnavailableError)
    return (*mendable, NotFiniteError, StoppedError, Diverged, Interrupted)


def _fail(message: str, code: int) -> int:
    print(f"gcrl: {message}", file=sys.stderr)
    return code
