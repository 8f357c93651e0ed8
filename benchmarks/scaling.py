"""Cost and memory of each kernel on paper, from the formulas: the tables of docs/scaling.md.

    python -m benchmarks.scaling                            prints them
    python -m benchmarks.scaling --write docs/scaling.md    puts them into the document

Every time here is a floor: what the stated peak rates allow at best. Only the last table has times
of a machine, as multiples of its own floors: those of benchmarks/results/*_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.costs import (
    ATTENTION,
    BF16,
    COLORS,
    CONTRAST,
    FP32,
    H100,
    LINEAR,
    Card,
    all_gather,
    all_reduce,
    attention,
    crossing,
    exponentials,
    linear_cross_entropy,
    nearest_color,
    nt_xent,
    nt_xent_units,
    parameters,
    ring,
    step_floor,
    step_flops,
    step_work,
)  # fmt: skip
from benchmarks.documents import fill
from benchmarks.results import FOLDER
from gcrl.presets import CIFAR10

RESULTS = tuple(sorted(FOLDER.glob("*_cpu.json")))
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


def amount(value: float, unit: str) -> str:
    """Three digits and a prefix: 537 MB, 1.28 ms."""
    if value == 0:
        return f"0 {unit}"
    prefixes = {15: "P", 12: "T", 9: "G", 6: "M", 3: "k", 0: "", -3: "m", -6: "µ", -9: "n"}
    value = float(f"{value:.3g}")
    power = next((p for p in prefixes if value >= 10**p), -9)
    scaled = value / 10.0**power
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {prefixes[power]}{unit}"


def percent(share: float) -> str:
    return "under 0.01%" if 0 < share < 1e-4 else f"{100 * share:.3g}%"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Markdown; the first columns, `words` of them, are on the left, numbers on the right."""
    sides = ["---"] * words + ["---:"] * (len(head) - words)
    lines = [head, sides, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attention_table(card: Card = H100) -> str:
    head = ["image", "images", "a tensor", "forward moves", "backward moves", "forward products",
            "backward products", "forward floor", "backward floor", "set by",
            "scores, if stored"]  # fmt: skip
    rows = []
    for side, batch in [*((s, 128) for s in (8, 16, 32, 64, 128, 256)), (32, 32), (32, 2048)]:
        positions, heads, features = batch * side**2, 8, 64
        forward, backward = attention(positions, side, heads * features)
        limits = dict.fromkeys([card.limit(forward), card.limit(backward)])
        rows.append([
            f"{side}x{side}", f"{batch:,}", amount(forward.bytes / 4, "B"),
            *(amount(work.bytes, "B") for work in (forward, backward)),
            *(amount(work.flops, "flop") for work in (forward, backward)),
            *(amount(card.floor(work), "s") for work in (forward, backward)),
            ", then ".join(limits), amount(positions * heads * side * FP32, "B"),
        ])  # fmt: skip
    return table(head, rows)


def crossing_table(card: Card = H100) -> str:
    head = ["pass", "tensors moved", "products", "row length"]
    passes = [("forward", 4, 2), ("backward", 7, 5), ("both", 11, 7)]
    return table(
        head, [[name, str(t), str(p), f"{crossing(t, p, card):.0f}"] for name, t, p in passes]
    )


def color_table(card: Card = H100) -> str:
    head = ["image", "images", "positions", "three products", "inputs and gradients", "floor",
            "set by", "logits, if stored", "tokens: moved", "distances",
            "tokens' floor"]  # fmt: skip
    width, colors = CIFAR10.model.width, CIFAR10.model.colors
    rows = []
    for side, batch in [*((s, 128) for s in (16, 32, 64, 128)), (32, 1024)]:
        positions = batch * side**2
        work = linear_cross_entropy(positions, width, colors)
        moved, operations = nearest_color(positions, colors)
        floor = max(moved / card.bytes, operations / card.float32)
        rows.append([
            f"{side}x{side}", f"{batch:,}", f"{positions:,}", amount(work.flops, "flop"),
            amount(work.bytes, "B"), amount(card.floor(work), "s"), card.limit(work),
            amount(positions * colors * FP32, "B"), amount(moved, "B"),
            amount(operations, "op"), amount(floor, "s"),
        ])  # fmt: skip
    return table(head, rows)


def nt_xent_table(card: Card = H100) -> str:
    head = ["2N", "forward products", "backward products", "exponentials", "products' floor",
            "exponentials' floor", "embeddings", "2N x 2N, if stored"]  # fmt: skip
    width = CIFAR10.model.projection_dim
    forward, backward = nt_xent_units()
    rows = []
    for views in (512, 4096, 32_768, 131_072, 1_048_576):
        unit, pairs = views**2 * width, exponentials(views)
        rows.append([
            f"{views:,}", amount(forward * unit, "flop"), amount(backward * unit, "flop"),
            amount(pairs, "exp"), amount(nt_xent(views, width) / card.flops, "s"),
            amount(pairs / card.exponentials, "s"), amount(views * width * BF16, "B"),
            amount(views**2 * FP32, "B"),
        ])  # fmt: skip
    return table(head, rows)


def ranks_table(card: Card = H100) -> str:
    head = ["GPUs", "2N of all", "all: received", "all: held", "all: time at peak",
            "ring: received", "ring: held", "ring: time at peak",
            "gradients averaged: received"]  # fmt: skip
    model, views = CIFAR10.model, 2 * CIFAR10.optim.batch_size
    rows = []
    for ranks in RANKS:
        row = [f"{ranks:,}", f"{ranks * views:,}"]
        for gather in (all_gather, ring):
            cost = gather(ranks, views, model.projection_dim, card)
            row += [amount(cost.received, "B"), amount(cost.held, "B"), amount(cost.seconds, "s")]
        rows.append([*row, amount(all_reduce(ranks, parameters(model)), "B")])
    return table(head, rows)


def share_table(card: Card = H100) -> str:
    head = ["GPUs", "2N of all", "NT-Xent's products", "the step's", "share of the products",
            "NT-Xent's floor", "the step's floor", "share of time, all",
            "share of time, ring"]  # fmt: skip
    model, batch = CIFAR10.model, CIFAR10.optim.batch_size
    width, views = model.projection_dim, 2 * batch
    rows = []
    for ranks in (1, *RANKS):
        flops = step_flops(model, batch, ranks)
        own, whole = flops[CONTRAST], sum(flops.values())
        floor, step = (
            max(own / card.flops, exponentials(ranks * views, ranks) / card.exponentials),
            step_floor(model, batch, ranks, card),
        )
        waits = [gather(ranks, views, width, card).seconds for gather in (all_gather, ring)]
        rows.append([
            f"{ranks:,}", f"{ranks * views:,}", amount(own, "flop"), amount(whole, "flop"),
            percent(own / whole), amount(floor, "s"), amount(step, "s"),
            *(percent((floor + wait) / (step + wait)) for wait in waits),
        ])  # fmt: skip
    return table(head, rows)


def step_table(card: Card = H100) -> str:
    head = ["image", "images", "products of a step", *(LINEAR, ATTENTION, COLORS, CONTRAST),
            "attention moves", "attention's floor", "the step's floor",
            "attention's share of it"]  # fmt: skip
    rows = []
    for side, batch in [(16, 256), (32, 256), (64, 256), (128, 256), (32, 1024), (32, 16_384)]:
        model = replace(CIFAR10.model, grid=(side, side))
        work = step_work(model, batch)
        whole = sum(part.flops for part in work.values())
        floor, step = card.floor(work[ATTENTION]), step_floor(model, batch, card=card)
        rows.append([
            f"{side}x{side}", f"{batch:,}", amount(whole, "flop"),
            *(percent(part.flops / whole) for part in work.values()),
            amount(work[ATTENTION].bytes, "B"), amount(floor, "s"), amount(step, "s"),
            percent(floor / step),
        ])  # fmt: skip
    return table(head, rows)


TABLES = {
    "attention": attention_table,
    "attention-crossing": crossing_table,
    "color-cross-entropy": color_table,
    "nt-xent": nt_xent_table,
    "nt-xent-ranks": ranks_table,
    "nt-xent-share": share_table,
    "step": step_table,
}


def measured_table(paths: Sequence[Path]) -> str:
    """How many times its floor each case took, from files of results; a sentence if there is none.

    The floor is that of the same run, from the rates that it measured.
    """
    return "\n\n".join(map(_measured, paths)) or "No results have been recorded yet."


def _measured(path: Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    named = [(*name.rsplit(" ", 1), rate) for name, rate in content["floors"].items()]
    rates = ", ".join(f"{what} {amount(rate, unit)}" for what, unit, rate in named)
    machine = content["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {content['threads']} threads"
    head = ["kernel", "case", "pass", "ours / floor", "fastest other / floor"]
    rows = []
    for contest in content["contests"]:
        case = ", ".join(f"{name} {value}" for name, value in contest["case"].items())
        right = {
            name: entry["median"] / contest["floor"]
            for name, entry in contest["contenders"].items()
            if entry["status"] == "ok" and entry["error"] is not None  # a yardstick has none
        }
        ours = [times for name, times in right.items() if name.startswith("gcrl_kernels")]
        others = [times for name, times in right.items() if not name.startswith("gcrl_kernels")]
        rows.append([
            f"`{contest['operation']}`", case, contest["pass"],
            *(f"{min(times):.3g}" if times else "" for times in (ours, others)),
        ])  # fmt: skip
    line = f"{where}, commit {content['commit'][:10]}; rates of that run: {rates}."
    return f"{line}\n\n{table(head, rows, words=3)}"


def tables(results: Sequence[Path] = RESULTS) -> dict[str, str]:
    """Every table of the document by its name."""
    return {name: make() for name, make in TABLES.items()} | {"measured": measured_table(results)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--results", type=Path, nargs="*", default=RESULTS, help="measured times")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables in FILE")
    given = parser.parse_args(arguments)
    try:
        made = tables(given.results)
        if given.write is not None:
            document = given.write.read_text(encoding="utf-8")
            given.write.write_text(fill(document, made), encoding="utf-8")
            return 0
    except (OSError, ValueError, KeyError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for name, text in made.items():
        print(f"{name}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
