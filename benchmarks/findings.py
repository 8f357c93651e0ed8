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
from gcrl.evaluation.markdown import number, rows
from gcrl.figures import save
from gcrl.study import report
from gcrl.study.verdict import ACCURACY, BITS

DIGITS, PHOTOGRAPHS = "study-digits", "study-cifar10-small"  # their marks and pictures
STUDIES = {DIGITS: "study_digits.json", PHOTOGRAPHS: "study_cifar10_small.json"}
SEARCH = RESULTS.name
REFERENCE = "study_digits_reference.json"  # the hybrid on plain PyTorch in place of the kernels
COMPARED = {ACCURACY: "probe accuracy", "knn": "k-NN accuracy", BITS: "bits per pixel"}


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that there are, by the names of their marks."""
    names = {**STUDIES, "search": SEARCH, "reference": REFERENCE}
    files = {name: folder / file for name, file in names.items()}
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
    if {DIGITS, "reference"} <= set(found):
        texts["reference"] = reference_table(found[DIGITS], found["reference"])
    return texts


def short(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The text of the README's mark: what the study of photographs found."""
    if PHOTOGRAPHS not in found:
        return {}
    study = found[PHOTOGRAPHS]
    parts = (
        f"{report.headline(study)} {_origin(study, STUDIES[PHOTOGRAPHS], '')}",
        "\n".join(report.networks(study)),
        f"![the study](docs/pictures/{PHOTOGRAPHS}.png)",
        "\n".join(report.verdicts(study)),
    )
    return {"findings": "\n\n".join(parts)}


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


def reference_table(study: dict[str, Any], reference: dict[str, Any]) -> str:
    """The hybrid of each of the study's seeds, and of one of them without the kernels."""
    seeds = {f"seed {entry['seed']}": entry["networks"]["hybrid"] for entry in study["seeds"]}
    (plain,) = reference["seeds"]
    seeds[f"seed {plain['seed']}, plain PyTorch"] = plain["networks"]["hybrid"]
    lines = [(name, *(measured[key] for key in COMPARED)) for name, measured in seeds.items()]
    table = rows(("hybrid", *COMPARED.values()), lines, number)
    return "\n".join([_origin(reference, REFERENCE, "../"), "", *table])


def _origin(results: dict[str, Any], file: str, root: str) -> str:
    """Where results come from; `root` leads from the document to the repository's folder."""
    machine = results["machine"]
    threads = f"{results['threads']} thread{'s' if results['threads'] > 1 else ''}"
    place = machine["gpu"] or f"{machine['cpu']}, {threads}"
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
