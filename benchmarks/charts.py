"""Charts of a run of the benchmarks: SVG on a transparent ground, for light pages and for dark.

Of each operation: every case's peers in multiples of our time; then time, share of the floor and
memory against the size that grows in its longest series of cases, or as dots where it has none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

if TYPE_CHECKING:
    from benchmarks.report import Contest, Run

Case = dict[str, Any]
Series = tuple[str, list[Case]]  # a field, and cases in its order
SHORTEST = 3  # points of a series
ROWS = 2  # series in a chart
PEERS = 6  # in a chart; the tables have all
MARKERS = "osD^vP"
PAD = 0.1  # inches
WIDTH = 135  # letters of a legend's line


@dataclass(frozen=True)
class Theme:
    name: str
    page: str
    text: str
    quiet: str
    rule: str
    ours: str
    peers: tuple[str, ...]


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0a58ca",
          ("#57606a", "#d9480f", "#2b8a3e", "#a8328a", "#6b3410", "#3d2b56")),
    Theme("dark", "#0d1117", "#e6edf3", "#9198a1", "#3d444d", "#58a6ff",
          ("#a9b4bf", "#f0973c", "#63e6be", "#e64980", "#c08457", "#ffe066")),
)  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """What an axis shows: its title, a contender's value in a contest, and how a tick reads."""

    title: str
    value: Callable[[Contest, str], float | None]
    tick: Callable[[float], str]
    base: int | None = 10  # of a logarithmic axis


def _mebibytes(contest: Contest, name: str) -> float | None:
    peak = contest.peak(name)
    return None if peak is None else max(1, peak / 2**20)  # less is not told apart


RATIO = Quantity(
    "times as long as ours",
    lambda c, name: c.ratio(name) if c.ours else None,
    lambda v: f"{v:g}×",
)
TIME = Quantity(
    "time",
    lambda c, name: c.seconds(name) * 1e3,
    lambda v: f"{v:g} ms" if v >= 0.1 else f"{v * 1e3:g} µs",
)
FLOOR = Quantity("share of the floor", lambda c, name: c.share(name), lambda v: f"{v:.0%}", None)
MEMORY = Quantity(
    "peak memory",
    _mebibytes,
    lambda v: "≤1 MiB" if v == 1 else f"{v:g} MiB" if v < 1024 else f"{v / 1024:g} GiB",
    2,
)


def describe(case: Case, fields: Iterable[str] | None = None) -> str:
    """A case in words, or these of its fields: "batch 8, 32x32, causal"."""
    chosen = {field: case[field] for field in (case if fields is None else fields)}
    words = [
        field if value is True else value if isinstance(value, str) else f"{field} {value}"
        for field, value in chosen.items()
        if value is not False
    ]
    return ", ".join(words or [f"not {field}" for field in chosen])


def distinct(contests: Iterable[Contest]) -> list[Case]:
    """Their cases, in order."""
    return list({repr(contest.case): contest.case for contest in contests}.values())


def shared(cases: Sequence[Case]) -> list[str]:
    """The fields in which all cases are equal."""
    first = cases[0]
    return [f for f in first if all(f in case and case[f] == first[f] for case in cases)]


def size(value: Any) -> float | None:
    """A number above 0, or the pixels of "32x64"; None for what is no size."""
    if isinstance(value, str):
        sides = value.split("x")
        return float(math.prod(map(int, sides))) if all(map(str.isdecimal, sides)) else None
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) if number else None


def longest_series(cases: Sequence[Case]) -> list[Series]:
    """At most ROWS of them, first the one with most cases: a size grows, all else is equal.

    Only where there is none may a second field change along, as a batch that shrinks.
    """
    found: list[Series] = []
    for companions in (0, 1):
        options = list(_series(cases, companions)) if not found else []
        while options and len(found) < ROWS:
            shown = [case for _, members in found for case in members]
            new = [sum(case not in shown for case in members) for _, members in options]
            if max(new) < SHORTEST - 1:
                break
            found.append(options[new.index(max(new))])
    return found


def _series(cases: Sequence[Case], companions: int) -> Iterator[Series]:
    sizes = [field for field in cases[0] if all(size(case.get(field)) for case in cases)]
    sizes.sort(key=lambda field: not isinstance(cases[0][field], str))  # an image's comes first
    for field in sizes:
        for others in combinations([other for other in sizes if other != field], companions):
            groups: dict[str, list[Case]] = {}
            for case in cases:
                fixed = {f: case[f] for f in case if f not in (field, *others)}
                groups.setdefault(repr(fixed), []).append(case)
            for group in groups.values():
                if len({size(case[field]) for case in group}) == len(group) >= SHORTEST:
                    yield field, sorted(group, key=lambda case: size(case[field]) or 0)


def draw(run: Run, folder: Path) -> dict[str, list[str]]:
    """Draw a run's charts into the folder; for each operation the HTML that shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[str]] = {}
    for operation, contests in run.operations.items():
        contests = [contest for contest in contests if contest.right]
        series = longest_series(distinct(contests)) if contests else []
        kinds = {"cases": RATIO, "time": TIME if run.gpu else RATIO}
        kinds |= {"floor": FLOOR, "memory": MEMORY}
        if not series and not run.gpu:
            del kinds["time"]  # it is in "cases"
        for kind, quantity in kinds.items() if contests else ():
            name = f"{run.path.stem}-{operation}-{kind}"
            for theme in THEMES:
                chart = _Chart(theme, quantity, contests)
                figure = chart.lines(series) if series and kind != "cases" else chart.dots()
                chart.entitle(figure, f"{operation}: {quantity.title}", run.machine)
                _save(figure, folder / f"{name}-{theme.name}.svg")
            pictures.setdefault(operation, []).append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">'
                f'<img alt="{operation}: {quantity.title}" src="{name}-light.svg"></picture>'
            )
    return pictures


def _save(figure: Figure, path: Path) -> None:
    """The same bytes for the same chart."""
    with mpl.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


class _Chart:
    """One quantity of an operation's contests, a column of panels for each pass."""

    def __init__(self, theme: Theme, quantity: Quantity, contests: Sequence[Contest]) -> None:
        self.theme, self.quantity, self.contests = theme, quantity, contests
        self.passes = list(dict.fromkeys(contest.way for contest in contests))
        best: dict[str, float] = {}
        for contest in contests:
            for name in contest.peers:
                best[name] = min(contest.ratio(name), best.get(name, math.inf))
        peers = sorted(best, key=lambda name: (name != "PyTorch", best[name]))[:PEERS]
        self.left_out = len(best) - len(peers)
        winners = Counter(contest.ours[0] for contest in contests if contest.ours)
        self.main = [name for name, _ in winners.most_common(1)]
        ours = dict.fromkeys(name for contest in contests for name in contest.ours)
        if quantity is RATIO:
            ours = dict.fromkeys(winners)
        self.styles: dict[str, dict[str, Any]] = {  # in the order of drawing, ours on top
            name: {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.3}
            for name, color, marker in zip(peers, theme.peers, MARKERS, strict=False)
        }
        for name in ours:
            style = {"marker": ".", "markersize": 4.5, "linewidth": 1.3, "linestyle": (0, (4, 2))}
            if name in self.main:
                style = {"marker": "o", "markersize": 6.5, "linewidth": 2.8}
            self.styles[name] = {"color": theme.ours, **style}

    def entitle(self, figure: Figure, title: str, machine: str) -> None:
        aside = machine + (f"; {self.left_out} more peers in the table" if self.left_out else "")
        top = 1 - PAD / figure.get_figheight()
        figure.text(0.99, top, aside, ha="right", va="top", size=8, color=self.theme.quiet)
        figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold", color=self.theme.text)

    def lines(self, series: Sequence[Series]) -> Figure:
        """Against a size, a row of panels for each series; names stand at the lines' ends."""
        figure = _figure(0.4 + 2.9 * len(series))
        grid = figure.subplots(len(series), len(self.passes), squeeze=False, sharey="row")
        for (field, cases), panels in zip(series, grid, strict=True):
            contests = [c for case in cases for c in self.contests if c.case == case]
            fixed = shared(cases)
            along = [f for f in cases[0] if f not in fixed and f != field]
            sizes = [size(case[field]) or 0 for case in cases]
            places = range(len(cases)) if along else [math.log(value) for value in sizes]
            labels = [f"{case[field]}\n{describe(case, along)}".strip() for case in cases]
            for way, axes in zip(self.passes, panels, strict=True):
                self._ground(axes, axes.yaxis, contests, way, describe(cases[0], fixed))
                axes.set_xticks(places, labels)
                axes.set_xlabel(field, color=self.theme.quiet, size=8)
                ends: dict[str, tuple[float, float]] = {}
                for name in self.styles:
                    points = self._points([c for c in contests if c.way == way], name)
                    if points:
                        xs = [places[cases.index(case)] for case, _ in points]
                        ys = [value for _, value in points]
                        axes.plot(xs, ys, clip_on=False, **self.styles[name])
                        ends[name] = xs[-1], ys[-1]
                self._names(axes, ends)
        return figure

    def dots(self) -> Figure:
        """A row for each case; beside our time, the name of the fastest peer."""
        cases = distinct(self.contests)
        fixed = shared(cases) if len(cases) > 1 else []
        labels = [describe(case, [f for f in case if f not in fixed]) for case in cases]
        figure = _figure(1.2 + 0.26 * len(cases))
        (panels,) = figure.subplots(1, len(self.passes), squeeze=False, sharey="row")
        for way, axes in zip(self.passes, panels, strict=True):
            contests = [contest for contest in self.contests if contest.way == way]
            self._ground(axes, axes.xaxis, self.contests, way, describe(cases[0], fixed))
            axes.yaxis.grid(color=self.theme.rule, linewidth=0.6)
            axes.set_yticks(range(len(cases)), labels)
            axes.set_ylim(len(cases) - 0.5, -0.5)
            for name, style in self.styles.items():
                points = self._points(contests, name)
                rows = [cases.index(case) for case, _ in points]
                axes.plot([value for _, value in points], rows, **{**style, "linestyle": "none"})
            for contest in contests if self.quantity is RATIO else ():
                for peer in contest.peers[:1] if contest.ours else ():
                    place = (1.03, cases.index(contest.case))
                    color = self.styles.get(peer, {"color": self.theme.quiet})["color"]
                    axes.annotate(
                        f"{peer} {contest.ratio(peer):.2f}×", place, size=8, color=color,
                        xycoords=("axes fraction", "data"), va="center",
                        weight="bold" if contest.ratio(peer) < 1 else None,
                    )  # fmt: skip
        lines = [Line2D([], [], label=_label(n), **self.styles[n]) for n in self.styles]
        letters = sum(len(_label(name)) + 6 for name in self.styles)
        columns = math.ceil(len(lines) / math.ceil(letters / WIDTH))
        figure.legend(
            handles=lines, loc="outside lower left", ncol=columns, frameon=False, fontsize=8,
            labelcolor=self.theme.text, handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip
        return figure

    def _points(self, contests: Iterable[Contest], name: str) -> list[tuple[Case, float]]:
        values = [(c.case, self.quantity.value(c, name)) for c in contests if name in c.right]
        return [(case, value) for case, value in values if value is not None]

    def _ground(self, axes: Axes, axis: Axis, contests: Sequence[Contest], *titles: str) -> None:
        """Limits, ticks and grid of the axis that shows the quantity of the contests."""
        theme, quantity = self.theme, self.quantity
        way = "x" if axis is axes.xaxis else "y"
        values = [v for name in self.styles for _, v in self._points(contests, name)] or [1.0]
        low, high = min(values), max(values)
        if quantity.base is None:
            low, high = 0, 1.05 * max(1, high)
        else:
            getattr(axes, f"set_{way}scale")("log")
            low, high = min(low, high / 1.5), max(high, 1.5 * low)
            room = (high / low) ** 0.06
            low, high = low / room, high * room
        getattr(axes, f"set_{way}lim")(low, high)
        ticks = _ticks(quantity.base, low, high)
        axis.set_ticks(ticks, [quantity.tick(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
        axis.grid(color=theme.rule, linewidth=0.6)
        if quantity in (RATIO, FLOOR):
            mark = theme.ours if quantity is RATIO else theme.text
            (axes.axvline if way == "x" else axes.axhline)(1, color=mark, linewidth=1)
        axes.set_axisbelow(True)
        axes.set_title(": ".join(filter(None, titles)), loc="left", size=9, color=theme.text)
        axes.tick_params(colors=theme.quiet, length=0, labelsize=8)
        axes.spines[:].set_visible(False)

    def _names(self, axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
        """Each line's name beside its end; above it where a contender fails at larger sizes."""
        last = max((x for x, _ in ends.values()), default=0)
        scale = axes.transScale + axes.transLimits
        heights = {name: scale.transform(end)[1] for name, end in ends.items() if end[0] == last}
        apart = _apart(heights, 0.07)
        for name, end in ends.items():
            color = self.styles[name]["color"]
            weight = "bold" if name in self.main else None
            font: dict[str, Any] = {"size": 8, "color": color, "weight": weight}
            if name in apart:
                leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6}
                leader |= {"relpos": (0, 0.5), "shrinkB": 5}
                axes.annotate(
                    _label(name), end, (1.07, apart[name]), textcoords="axes fraction",
                    va="center", arrowprops=leader, annotation_clip=False, **font,
                )  # fmt: skip
            else:
                axes.annotate(
                    _label(name), end, (-4, 3), textcoords="offset points", ha="right",
                    path_effects=[withStroke(linewidth=2.5, foreground=self.theme.page)], **font,
                )  # fmt: skip


def _label(name: str) -> str:
    return name.replace("gcrl_kernels ", "ours: ")


def _figure(height: float) -> Figure:
    return Figure(figsize=(10, height), layout=ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD))


def _ticks(base: int | None, low: float, high: float) -> list[float]:
    """Round values, at least three where they can be."""
    if base is None:
        step = 0.25 * math.ceil(high / 1.5)
        return [step * index for index in range(int(high / step) + 1)]
    grids = [(1,), (1, 3), (1, 2, 5), (1, 1.25, 1.5, 2, 3, 5, 8)]
    every = [[d * 10.0**power for power in range(-6, 7) for d in grid] for grid in grids]
    if base == 2:
        every = [[2.0**power for power in range(0, 42, step)] for step in (6, 4, 2, 1)]
    found = [[tick for tick in ticks if low <= tick <= high] for ticks in every]
    return next((ticks for ticks in found if len(ticks) >= 3), found[-1])


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The heights, moved as little as leaves a gap between neighbours."""
    names = sorted(heights, key=lambda name: heights[name])
    groups: list[tuple[float, int]] = []  # the middle of names that touch, and how many they are
    for name in names:
        middle, count = heights[name], 1
        while groups and middle - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
            below, fewer = groups.pop()
            middle = (middle * count + below * fewer) / (count + fewer)
            count += fewer
        groups.append((middle, count))
    placed = [m + gap * (i - (count - 1) / 2) for m, count in groups for i in range(count)]
    return dict(zip(names, placed, strict=True))
