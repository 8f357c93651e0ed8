"""What the studies and the search found, put into the documents from their results.

    python -m benchmarks.findings

fills docs/findings.md and README.md from benchmarks/results and draws the studies' figures into
docs/pictures. What has no results yet is left as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.documents import fill
from benchmarks.environment import ROOT
from benchmarks.results import FOLDER
from benchmarks.search import RESULTS, START
from gcrl.evaluation.markdown import rows
from gcrl.figures import save
from gcrl.study import report

STUDIES = {
    "study-digits": "study_digits.json",
    "study-cifar10-small": "study_cifar10_small.json",
}  # what their marks and pictures are called
SEARCH = RESULTS.name


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that there are, by the names of their marks."""
    files = {name: folder / file for name, file in {**STUDIES, "search": SEARCH}.items()}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }


def page(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The text of each mark in docs/findings.md."""
    texts = {}
    for name, file in STUDIES.items():
        if name in found:
            text, picture = report.table(found[name]), f"![the study](pictures/{name}.png)"
            texts[name] = f"{_origin(found[name], file, '../')}\n\n{text}\n{picture}"
    if "search" in found:
        texts["search"] = search_table(found["search"])
    return texts


def short(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The text of the README's mark: each study's figure and verdicts."""
    parts = [
        "\n\n".join(
            (
                f"![the study](docs/pictures/{name}.png)",
                f"{report.headline(found[name])} {_origin(found[name], file, '')}",
                "\n".join(report.verdicts(found[name])),
            )
        )
        for name, file in STUDIES.items()
        if name in found
    ]
    return {"findings": "\n\n".join(parts)} if parts else {}


def search_table(results: dict[str, Any]) -> str:
    """A line for every trial, the chosen one in bold."""
    header = ("trial", *START, "images", "probe accuracy", "bits per pixel", "score")
    lines = []
    for entry in results["trials"]:
        name = entry["trial"]
        lines.append(
            (
                f"**{name}**" if name == results["chosen"] else name,
                *(f"{entry[key]:g}" for key in START),
                f"{entry['images']:,}",
                f"{100 * entry['probe_accuracy']:.1f}%",
                f"{entry['bits_per_pixel']:.3f}",
                f"{entry['score']:.1f}",
            )
        )
    return "\n".join([_origin(results, SEARCH, "../"), "", *rows(header, lines, str)])


def _origin(results: dict[str, Any], file: str, root: str) -> str:
    """Where results come from; `root` leads from the document to the repository's folder."""
    machine = results["machine"]
    place = machine["gpu"] or f"{machine['cpu']}, {results['threads']} threads"
    link = f"[{file}]({root}benchmarks/results/{file})"
    return f"{place}, commit {results['commit'][:10]}: {link}."


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    found = load(FOLDER)
    for name in STUDIES:
        if name in found:
            save(report.figure(found[name]), ROOT / "docs" / "pictures" / f"{name}.png")
    documents = {ROOT / "docs" / "findings.md": page(found), ROOT / "README.md": short(found)}
    for path, texts in documents.items():
        path.write_text(fill(path.read_text(encoding="utf-8"), texts), encoding="utf-8")


if __name__ == "__main__":
    main()
