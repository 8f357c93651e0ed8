"""What the benchmarks measured, as Markdown tables and as charts.

    pytest benchmarks --results benchmarks/results/NAME.json
    python -m benchmarks.report benchmarks/results/NAME.json --out docs/benchmarks

prints the tables, and writes them with charts to a folder or their short form into a README.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.documents import fill

OURS = "gcrl_kernels "  # then the backend: the name of a contender of ours
LEVEL = 0.02  # a smaller difference is none, however quiet the run
MARK = "benchmarks"  # of the README's part
SHORT = 4  # cases of an operation in the short form
LEGEND = (
    "Our fastest backend stands beside the fastest peer whose answer is right; *level with*: they "
    "differ by less than 2%, or by less than the noise, which is how far the same code differed "
    "when it was timed twice. The floor is the least time for the bytes and the matrix products at "
    "the rates measured in the same run; memory is the peak beyond inputs and outputs."
)
FULL_LEGEND = (
    "The second table has all times, in multiples of our best, or of the fastest where none of "
    "ours succeeded; a yardstick computes something else: it is in italics and counts as no peer."
)
CPU_LEGEND = "A CPU's times are given as ratios alone: they compare within one run."


class ReportError(Exception):
    """There is nothing to report; the message says why."""


@dataclass(frozen=True)
class Contest:
    """What the contenders did on a case, forward or forward+backward."""

    operation: str
    case: dict[str, Any]
    way: str
    floor: float  # seconds
    noise: float  # 0.02 is 2%
    contenders: dict[str, dict[str, Any]]

    @property
    def timed(self) -> list[str]:
        """Fastest first; yardsticks too, whose answer is another thing's and is not checked."""
        names = [name for name, entry in self.contenders.items() if entry["status"] == "ok"]
        return sorted(names, key=self.seconds)

    @property
    def right(self) -> list[str]:
        """Contenders whose answer was checked and right, fastest first."""
        return [name for name in self.timed if self.contenders[name]["error"] is not None]

    @property
    def ours(self) -> list[str]:
        return [name for name in self.right if name.startswith(OURS)]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.right if not name.startswith(OURS)]

    def seconds(self, name: str) -> float:
        return float(self.contenders[name]["median"])

    def share(self, name: str) -> float:
        """Of the floor: at 1 the machine can do no better."""
        return self.floor / self.seconds(name)

    def ratio(self, name: str) -> float:
        """To our time; to the fastest one's where none of ours succeeded."""
        return self.seconds(name) / self.seconds([*self.ours, *self.timed][0])

    def peak(self, name: str) -> int | None:
        """Bytes of memory."""
        return self.contenders[name]["peak_bytes"]


@dataclass(frozen=True)
class Run:
    """One file of results."""

    path: Path
    content: dict[str, Any]
    operations: dict[str, list[Contest]]

    @property
    def gpu(self) -> bool:
        return self.content["machine"]["gpu"] is not None

    @property
    def machine(self) -> str:
        machine = self.content["machine"]
        return machine["gpu"] or f"{machine['cpu']}, {self.content['threads']} threads"


def load(path: Path) -> Run:
    """Read a file that `pytest benchmarks --results` wrote.

    Raises:
        ReportError: it is missing, damaged, empty, or another kind of file.
    """
    expected = "expected a file that `pytest benchmarks --results FILE` wrote"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: {expected}, got one that is not JSON: {error}") from error
    if not isinstance(content, dict) or "contests" not in content:
        kinds = {
            "benchmarks": "one of pytest-benchmark's own",
            "metrics": "a training run's record",
        }
        kind = [kinds[key] for key in kinds if isinstance(content, dict) and key in content]
        raise ReportError(f"{path}: {expected}, got {[*kind, 'something else'][0]}")
    names = ("operation", "case", "pass", "floor", "noise", "contenders")
    operations: dict[str, list[Contest]] = {}
    try:
        for entry in content["contests"]:
            contest = Contest(*(entry[name] for name in names))
            operations.setdefault(contest.operation, []).append(contest)
        run = Run(path, content, operations)
        full([run], path.parent)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ReportError(f"{path}: {expected}, got a damaged one: {what}") from error
    if not operations:
        raise ReportError(f"{path}: nothing was measured")
    return run


def full(
    runs: Sequence[Run], folder: Path, pictures: Mapping[Path, dict[str, list[str]]] | None = None
) -> str:
    """All tables of all runs, and pictures of each operation; links are relative to the folder."""
    parts, machine = ["# Benchmarks", f"{_legend(runs)}\n\n{FULL_LEGEND}"], ""
    for run in runs:
        parts += [f"## {run.machine}"] * (run.machine != machine) + [headline(run, folder)]
        machine = run.machine
        for operation, contests in run.operations.items():
            parts += [f"### `{operation}`", comparison(contests, run.gpu)]
            parts += (pictures or {}).get(run.path, {}).get(operation, [])
            parts += [everyone(contests, run.gpu), *breakdown(contests, run.gpu)]
            parts += left_out(contests)
    return "\n\n".join(parts) + "\n"


def short(runs: Sequence[Run], folder: Path) -> str:
    """Our best beside the fastest peer, in each operation's main cases."""
    parts = []
    for run in runs:
        parts.append(f"**{run.machine}.** {headline(run, folder)}")
        for operation, contests in run.operations.items():
            cases = charts.distinct(contests)
            series = charts.longest_series(cases)
            main = cases if len(cases) <= SHORT else series[0][1] if series else cases[:SHORT]
            shown = [c for case in main for c in contests if c.case == case]
            entered = list(dict.fromkeys(name for c in shown for name in c.contenders))
            peers = [name for name in entered if any(name in c.peers for c in shown)]
            absent = [name for name in entered if not any(name in c.timed for c in shown)]
            words = f"`{operation}`"
            words += f", {len(main)} of {len(cases)} cases" * (len(main) < len(cases))
            words += f". Peers: {'; '.join(peers) or 'none'}."
            words += f" Absent: {'; '.join(absent)}." * bool(absent)
            parts += [words, comparison(shown, run.gpu)]
    return "\n\n".join([*parts, _legend(runs)]) + "\n"


def headline(run: Run, folder: Path) -> str:
    """The rates that the floors rest on, versions, commit, and the file of the numbers."""
    content = run.content
    rates = dict(content["floors"])
    copied = rates.pop("copied byte/s", math.nan)
    products = [f"{_si(rate)}FLOP/s in {name.split()[0]}" for name, rate in rates.items()]
    versions = [f"{name} {version}" for name, version in content["versions"].items()]
    commit = f"commit {content['commit'][:10]}" + ("" if content["clean"] else " with changes")
    link = Path(os.path.relpath(run.path, folder)).as_posix()
    return (
        f"Copies {_si(copied)}B/s, multiplies {', '.join(products)}. "
        f"{', '.join([*versions, commit])}: [{run.path.name}]({link})."
    )


def comparison(contests: Sequence[Contest], gpu: bool) -> str:
    """A row per case and pass: our best beside the fastest peer."""
    head = ["pass", "ours", "best of ours", *["ms: floor / ours / peer"] * gpu]
    head += ["share of the floor: ours / peer", "memory: ours / peer", "noise"]
    rows = []
    for contest in contests:
        pair = [names[0] if names else None for names in (contest.ours, contest.peers)]
        seconds = [contest.floor, *(name and contest.seconds(name) for name in pair)]
        cells = [contest.way, verdict(contest), (pair[0] or "–").removeprefix(OURS)]
        cells += [" / ".join(_digits(s * 1e3) if s else "–" for s in seconds)] * gpu
        cells.append(" / ".join(f"{contest.share(name):.0%}" if name else "–" for name in pair))
        cells.append(" / ".join(_memory(contest.peak(name)) if name else "–" for name in pair))
        noisy = math.isfinite(contest.noise)
        rows.append([*cells, f"{math.expm1(contest.noise):.0%}" if noisy else "–"])
    return _table(contests, head, rows, left=4)


def verdict(contest: Contest) -> str:
    """How far our best is ahead of the fastest peer or behind it."""
    if not contest.ours or not contest.peers:
        return "no peer succeeded" if contest.ours else "none of ours succeeded"
    peer = contest.peers[0]
    ratio = contest.ratio(peer)
    if abs(math.log(ratio)) <= max(math.log1p(LEVEL), contest.noise):
        return f"level with {peer}"
    ahead = f"**{_digits(ratio)}× ahead of** {peer}"
    return ahead if ratio > 1 else f"{_digits(1 / ratio)}× behind {peer}"


def everyone(contests: Sequence[Contest], gpu: bool) -> str:
    """A row per case and pass, a column per contender that was timed in any."""
    entered = dict.fromkeys(name for contest in contests for name in contest.contenders)
    names = [name for name in entered if any(name in contest.timed for contest in contests)]
    names.sort(key=lambda name: not name.startswith(OURS))
    rows = []
    for contest in contests:
        row = [contest.way]
        for name in names:
            if name in contest.timed:
                mark = "**" if [name] == contest.right[:1] else "" if name in contest.right else "*"
                cell = f"{mark}{_digits(contest.ratio(name))}×{mark}"
                row.append(cell + f" ({_digits(contest.seconds(name) * 1e3)} ms)" * gpu)
            else:
                row.append(contest.contenders.get(name, {"status": "–"})["status"])
        rows.append(row)
    return _table(contests, ["pass", *names], rows, left=2)


def breakdown(contests: Sequence[Contest], gpu: bool) -> list[str]:
    """Where each contender's time goes, for those that say it: a table, or nothing."""
    told = [(c, name, c.contenders[name]) for c in contests for name in c.timed]
    told = [(contest, name, entry) for contest, name, entry in told if "where" in entry]
    if not told:
        return []
    parts = list(dict.fromkeys(part for _, _, entry in told for part in entry["where"]))
    rows = []
    for contest, name, entry in told:
        where = entry["where"]
        speed = _digits(entry["images_per_second"]) if gpu else f"{_digits(contest.ratio(name))}×"
        rows.append([name, speed, *(f"{where[p]:.0%}" if p in where else "–" for p in parts)])
    head = ["contender", "images a second" if gpu else "time", *parts]
    return [_table([contest for contest, _, _ in told], head, rows, left=2)]


def left_out(contests: Sequence[Contest]) -> list[str]:
    """Who was wrong, failed or was skipped, and why: a list, or nothing."""
    found: dict[str, list[Contest]] = {}
    for status in ("wrong", "failed", "skipped"):
        for contest in contests:
            for name, entry in contest.contenders.items():
                if entry["status"] == status:
                    reason = " ".join(entry["reason"].replace("`", "'").split())
                    found.setdefault(f"- {name} {status}: `{reason}`", []).append(contest)
    lines = []
    for line, where in found.items():
        count = f" ({len(where)} of {len(contests)})"
        if len(where) == 1:
            count = f" ({charts.describe(where[0].case)}, {where[0].way})"
        lines.append(line + count * (len(where) < len(contests)))
    return ["\n".join(lines)] if lines else []


def _table(
    contests: Sequence[Contest], head: list[str], rows: Sequence[list[str]], left: int
) -> str:
    """Markdown, with the case before each row; what all cases share is in the head."""
    cases = charts.distinct(contests)
    shared = charts.shared(cases) if len(cases) > 1 else []
    lines = [[f"case: {charts.describe(cases[0], shared)}" if shared else "case", *head]]
    lines.append(["---"] * left + ["---:"] * (len(lines[0]) - left))
    for case in cases:
        label = charts.describe(case, [field for field in case if field not in shared])
        for contest, row in zip(contests, rows, strict=True):
            if contest.case == case:
                lines.append([label, *row])
                label = ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _legend(runs: Sequence[Run]) -> str:
    return LEGEND if all(run.gpu for run in runs) else f"{LEGEND} {CPU_LEGEND}"


def _digits(value: float) -> str:
    """Three of them, as far as the fourth decimal."""
    return f"{value:.{min(4, max(0, 2 - math.floor(math.log10(value))))}f}"


def _si(value: float) -> str:
    return f"{_digits(value / 1e12)} T" if value >= 1e12 else f"{_digits(value / 1e9)} G"


def _memory(peak: int | None) -> str:
    mib = math.nan if peak is None else peak / 2**20
    if math.isnan(mib):
        return "–"
    if mib < 1:
        return "<1 MiB"
    return f"{_digits(mib)} MiB" if mib < 1024 else f"{_digits(mib / 1024)} GiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Turn results of the benchmarks into Markdown tables, printed, and charts.",
        epilog="The results come from: pytest benchmarks --results RESULTS.json",
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS.json",
        help="what a run left; several runs are reported one after another, never mixed",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="write the charts there, each as NAME-light.svg and NAME-dark.svg, and all tables "
        "with the charts as README.md",
    )  # fmt: skip
    parser.add_argument(
        "--readme", type=Path, metavar="FILE",
        help="print the short form, and replace with it what FILE has between its marks, "
        f"<!-- {MARK} --> and <!-- /{MARK} -->",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        runs = [load(path) for path in given.results]
        if given.out is not None:
            if len({path.stem for path in given.results}) < len(runs):
                raise ReportError(
                    "expected files of different names: the charts are called by them"
                )
            pictures = {run.path: charts.draw(run, given.out) for run in runs}
            (given.out / "README.md").write_text(full(runs, given.out, pictures), encoding="utf-8")
        if given.readme is not None:
            text = short(runs, given.readme.parent)
            document = given.readme.read_text(encoding="utf-8")
            try:
                given.readme.write_text(fill(document, {MARK: text}), encoding="utf-8")
            except ValueError as error:
                raise ReportError(f"{given.readme}: {error}") from error
    except (ReportError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(full(runs, given.out or Path()) if given.readme is None else text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
