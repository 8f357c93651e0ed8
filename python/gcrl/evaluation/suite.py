"""Runs the parts of an evaluation and keeps their results, to be stopped and resumed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import Any

from gcrl.checkpoint import replace_file
from gcrl.config import ConfigError, parse_json
from gcrl.evaluation import PARTS
from gcrl.evaluation.store import digest
from gcrl.evaluation.subject import NotMeasuredError, Subject
from gcrl.figures import save

FORMAT = 3  # of the results; to be raised when what is measured changes


class StoppedError(RuntimeError):
    """An evaluation was interrupted; what it had finished is kept."""

    exit_code = 130


def run_parts(
    subject: Subject, names: Iterable[str] = (), *, again: bool = False
) -> dict[str, Any]:
    """Measure the parts of these names, by default all, and write them into the subject's folder.

    Each leaves NAME.json, NAME.md and its pictures as soon as it is done; results.json and
    results.md hold all that are there of the network. A part whose file follows from the same
    network, images and options is not measured again, unless `again`. One that cannot be measured
    here says why under "not_measured", and leaves what was measured before. Returns the results by
    part.
    Raises ConfigError for a name that is no part, StoppedError after Ctrl-C.
    """
    subject.options.validate()
    chosen = choose_parts(names)
    subject.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for number, name in enumerate(chosen, 1):
        kept = None if again else find(subject, name)
        _say(subject, f"{name} ({number} of {len(chosen)}){': kept from before' if kept else ''}")
        try:
            results[name] = _measure(subject, name) if kept is None else kept
        except KeyboardInterrupt:
            raise StoppedError(
                f"interrupted in {name}; what is done is kept in {subject.folder}, "
                "and the same command goes on from there"
            ) from None
        _write_all(subject)
    return results


def choose_parts(names: Iterable[str]) -> list[str]:
    """The parts of these names in their order, by default all; ConfigError for another name."""
    wanted = list(names) or list(PARTS)
    for name in wanted:
        if name not in PARTS:
            raise ConfigError(f"parts: expected some of {', '.join(PARTS)}; got {name!r}")
    return [name for name in PARTS if name in wanted]


def find(subject: Subject, name: str) -> dict[str, Any] | None:
    """A part's results from before, if they follow from this network, images and options."""
    saved = _saved(subject, name)
    return saved["results"] if saved.get("key") == _key(subject, name) else None


def table(name: str, results: dict[str, Any]) -> str:
    """A part's results in Markdown, under its name."""
    if "not_measured" in results:
        return f"## {name}\n\nNot measured: {results['not_measured']}.\n"
    return f"## {name}\n\n{_part(name).table(results).strip()}\n"


def _measure(subject: Subject, name: str) -> dict[str, Any]:
    part, folder, begun = _part(name), subject.folder, time.monotonic()
    try:
        results = part.measure(subject)
        pictures = part.draw(results, subject)
    except NotMeasuredError as error:
        results, pictures = {"not_measured": str(error)}, {}
        if "not_measured" not in _saved(subject, name).get("results", results):
            return results
        for picture in folder.glob(f"{name}*.png"):  # of another network
            picture.unlink()
    for title, figure in pictures.items():
        save(figure, folder / f"{title}.png")
    replace_file(folder / f"{name}.md", table(name, results).encode())
    seconds = round(time.monotonic() - begun, 1)
    origin = {"key": _key(subject, name), "network": _network(subject), "seconds": seconds}
    _write_json(subject, name, {**origin, "results": results})
    return results


def _saved(subject: Subject, name: str) -> dict[str, Any]:
    """What a part's file holds if it is of this network, whatever the images and options."""
    try:
        saved = parse_json((subject.folder / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return {}
    ours = isinstance(saved, dict) and isinstance(saved.get("results"), dict)
    return saved if ours and saved.get("network") == _network(subject) else {}


def _network(subject: Subject) -> str:
    return digest(subject.features.fingerprint)


def _write_all(subject: Subject) -> None:
    """results.json and results.md, of all parts that are done."""
    saved = {name: _saved(subject, name) for name in PARTS}
    results = {name: part["results"] for name, part in saved.items() if part}
    heading = f"# {subject.dataset.name}, step {subject.run.step:,}, seed {subject.seed}\n"
    text = "\n".join([heading, *(table(name, part) for name, part in results.items())])
    _write_json(subject, "results", results)
    replace_file(subject.folder / "results.md", text.encode())


def _write_json(subject: Subject, name: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    replace_file(subject.folder / f"{name}.json", text.encode())


def _key(subject: Subject, name: str) -> str:
    """A hash of everything that a part's results follow from."""
    inputs = {"format": FORMAT, "seed": subject.seed, **_part(name).inputs(subject)}
    text = json.dumps(inputs, sort_keys=True).encode()
    return digest(name.encode(), text, subject.features.fingerprint, subject.fingerprint)


def _part(name: str) -> ModuleType:
    return import_module(f"gcrl.evaluation.{name}")


def _say(subject: Subject, text: str) -> None:
    if subject.progress:
        print(text, file=sys.stderr, flush=True)
