"""A run's folder before training and after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from gcrl import checkpoint
from gcrl.config import Config, ConfigError
from gcrl.data import NAMES, DataError, Dataset, load_dataset, memory_limit
from gcrl.distributed import Team
from gcrl.manifest import ADJUSTABLE, changed_settings
from gcrl.palette import fit, load_palette, save_palette
from gcrl.paths import expand


def check_folder(config: Config, folder: Path, team: Team, *, resume: bool) -> None:
    """See that training can begin in the folder or, with resume, go on in it.

    Raises:
        ConfigError: it cannot; the message says what can be done.
    """
    path = folder / "config.json"
    if not resume:
        if path.exists() or checkpoint.latest(folder) is not None:
            raise ConfigError(
                f"{folder} holds a run already: go on with --resume, or choose another folder "
                "with --out"
            )
    elif not path.exists():
        raise ConfigError(f"{folder} holds no run to go on with: start one without --resume")
    else:
        before, now = _located(Config.load(path)).flat(), _located(config).flat()
        changed = changed_settings(before, now)
        changes = [text for name, text in changed.items() if name not in ADJUSTABLE]
        if changes:
            raise ConfigError(
                f"{folder} cannot go on with another configuration: {'; '.join(changes)}. "
                "Leave these as they were, or choose another folder with --out"
            )
    team.wait()  # before anything is written there
    if team.leads and resume:
        checkpoint.clean(folder)


def prepare(config: Config, folder: Path, team: Team, *, progress: bool) -> tuple[Dataset, Tensor]:
    """The images and the palette; leaves config.json and palette.npy in the folder.

    The palette of a run that goes on is the one that lies there.

    Raises:
        DataError, ConfigError: the images or the palette cannot be used.
    """
    if not team.leads:
        team.wait(patiently=True)  # the first process downloads and fits
    with memory_limit(config.data.max_gigabytes):
        dataset = load_dataset(config.data.data, config.model.grid, download=config.data.download)
    _check_batch(config, dataset, team)
    path = folder / "palette.npy"
    if team.leads:
        settings = folder / "config.json"
        if not (settings.exists() and path.exists()):
            save_palette(path, _make_palette(config, dataset, progress=progress))
        checkpoint.replace_file(settings, _located(config).to_json().encode())
        team.wait(patiently=True)
    return dataset, _load_palette(path, config, rescale=False)


def report(config: Config, folder: Path, dataset: Dataset, *, progress: bool) -> None:
    """Evaluate the trained run, draw its pictures and print its table."""
    from gcrl import figures, run
    from gcrl.evaluation import summary

    trained = run.load(folder, device=config.runtime.device)
    results = summary.evaluate(trained, dataset, progress=progress)
    summary.write_results(folder, results)
    figures.draw_curves(folder)
    figures.draw_samples(trained, dataset)
    figures.draw_completions(trained, dataset)
    print(summary.table(results), end="")


def _located(config: Config) -> Config:
    """The configuration with absolute paths, which mean the same from every folder."""
    data, palette = config.data.data, config.data.palette
    if data not in NAMES:
        data = _absolute(data)
    if palette is not None:
        palette = _absolute(palette)
    return replace(config, data=replace(config.data, data=data, palette=palette))


def _absolute(path: str) -> str:
    """Its folder without links and '..', so that it is the same however it is reached."""
    expanded = expand(path)
    return str(expanded.parent.resolve() / expanded.name)


def _check_batch(config: Config, dataset: Dataset, team: Team) -> None:
    size = config.optim.batch_size * team.size
    if size > len(dataset.train):
        processes = f" ({config.optim.batch_size} on each of {team.size} processes)"
        raise DataError(
            f"batch_size: expected at most the {len(dataset.train)} training images of "
            f"{dataset.name}, got {size}{processes if team.size > 1 else ''}"
        )


def _make_palette(config: Config, dataset: Dataset, *, progress: bool) -> Tensor:
    if config.data.palette is not None:
        return _load_palette(expand(config.data.palette), config, rescale=True)
    try:
        return fit(dataset.train.images, config.model.colors, config.runtime.seed, progress)
    except ValueError as error:  # fewer pixels than colours
        raise ConfigError(f"colors: {error}") from error


def _load_palette(path: Path, config: Config, *, rescale: bool) -> Tensor:
    try:
        palette = load_palette(path, rescale=rescale)
    except (OSError, ValueError) as error:
        raise ConfigError(f"palette: {error}") from error
    if len(palette) != config.model.colors:
        raise ConfigError(
            f"palette: expected {config.model.colors} colours, as --colors says, "
            f"got {len(palette)} in {path}"
        )
    return palette
