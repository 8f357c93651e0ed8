"""The documents' parts that are made from studies and from the search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import findings
from benchmarks.documents import fill
from benchmarks.results import FOLDER
from benchmarks.search import START

ORIGIN = {
    "machine": {"cpu": "a CPU", "cores": 2, "gpu": None},
    "threads": 2, "commit": "0123456789abcdef",
}  # fmt: skip
TRIAL = {**START, "images": 16640, "probe_accuracy": 0.3528, "bits_per_pixel": 5.857, "score": -159}
SEARCH = {
    **ORIGIN, "chosen": "b",
    "trials": [{"trial": "a", **TRIAL}, {"trial": "b", **TRIAL, "beta": 3}],
}  # fmt: skip


def network(accuracy: float, bits: float | None) -> dict[str, Any]:
    found = {
        "test_images": 359, "accuracy": accuracy, "knn": 0.2, "auroc": {}, "ood_images": {},
        "training_flops": 2e12, "seconds": 90.0,
    }  # fmt: skip
    return found if bits is None else {**found, "bits_per_pixel": bits}


STUDY = {
    **ORIGIN,
    "dataset": "digits",
    "config": {"optim": {"steps": 600, "batch_size": 64, "accumulate": 1}},
    "sets": [],
    "set_sizes": {},
    "seeds": [{"seed": 0, "networks": {"hybrid": network(0.4, 1.5), "simclr": network(0.3, None)}}],
    "verdicts": [
        {"measure": "accuracy", "against": "simclr", "set": None, "short": -0.1, "allowed": 0.01,
         "keeps": True},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / findings.SEARCH).write_text(json.dumps(SEARCH))
    for file in findings.STUDIES.values():
        (tmp_path / file).write_text(json.dumps(STUDY))
    return tmp_path


def test_results_that_are_there_are_written_up(folder: Path) -> None:
    found = findings.load(folder)
    page = findings.page(found)
    assert set(page) == {"study-digits", "study-cifar10-small", "search"}
    lines = page["search"].splitlines()
    assert lines[0] == (
        "a CPU, 2 threads, commit 0123456789: "
        "[search_cifar10_small.json](../benchmarks/results/search_cifar10_small.json)."
    )
    assert lines[-2] == "| a | 0.002 | 1 | 0.5 | 4 | 2 | 16,640 | 35.3% | 5.857 | -159.0 |"
    assert lines[-1].startswith("| **b** | 0.002 | 3 |")
    study = page["study-digits"]
    assert (
        "digits: 38,400 images seen by every trained network, 1 seed; "
        "measured on 359 test images." in study
    )
    assert "| hybrid (GCRL) | 40.0% | 20.0% | 1.500 | 2 | 1.5 |" in study
    assert study.endswith("![the study](pictures/study-digits.png)")
    readme = findings.short(found)["findings"]
    assert "![the study](docs/pictures/study-cifar10-small.png)" in readme
    assert "](benchmarks/results/study_cifar10_small.json)" in readme
    assert "| hybrid (GCRL) | 40.0% | 20.0% | 1.500 | 2 | 1.5 |" in readme
    assert "- The hybrid keeps the probe accuracy" in readme


def test_the_reference_stands_beside_the_seeds(folder: Path) -> None:
    reference = {**STUDY, "seeds": [{"seed": 0, "networks": {"hybrid": network(0.39, 1.52)}}]}
    (folder / findings.REFERENCE).write_text(json.dumps(reference))
    text = findings.page(findings.load(folder))["reference"]
    assert "(../benchmarks/results/study_digits_reference.json)" in text
    assert text.splitlines()[-2:] == [
        "| seed 0 | 0.400 | 0.200 | 1.500 |", "| seed 0, plain PyTorch | 0.390 | 0.200 | 1.520 |",
    ]  # fmt: skip


def test_the_reference_is_within_the_spread_of_the_seeds() -> None:
    """Of the committed results: no further from the seeds' mean than they are from each other."""
    found = findings.load(FOLDER)
    seeds = [entry["networks"]["hybrid"] for entry in found[findings.DIGITS]["seeds"]]
    (plain,) = [entry["networks"]["hybrid"] for entry in found["reference"]["seeds"]]
    for key in findings.COMPARED:
        values = np.array([seed[key] for seed in seeds])
        assert abs(plain[key] - values.mean()) <= np.ptp(values)


def test_without_results_nothing_is_written(tmp_path: Path) -> None:
    assert findings.load(tmp_path) == {}
    assert findings.page({}) == findings.short({}) == {}


def test_the_documents_have_what_the_results_give(root: Path) -> None:
    found = findings.load(FOLDER)
    for name, texts in (("docs/findings.md", findings.page(found)),
                        ("README.md", findings.short(found))):  # fmt: skip
        document = (root / name).read_text(encoding="utf-8")
        assert fill(document, texts) == document, "run python -m benchmarks.findings"


def test_text_goes_between_its_marks() -> None:
    document = "a\n<!-- x -->\nold\n<!-- /x -->\nb <!-- y --><!-- /y -->"
    filled = "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb <!-- y --><!-- /y -->"
    assert fill(document, {"x": "new\n"}) == filled
    assert fill(filled, {"x": "new"}) == filled
    for wrong in ("", "<!-- x -->", "<!-- /x --> <!-- x -->"):
        with pytest.raises(ValueError, match="expected <!-- x --> and then <!-- /x --> in it"):
            fill(wrong, {"x": "new"})
