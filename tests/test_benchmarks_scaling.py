"""The formulas of docs/scaling.md by hand, and that the document has what they give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import costs, documents, scaling
from benchmarks.bench_axial_attention import Axial
from benchmarks.bench_color_cross_entropy import CrossEntropy
from benchmarks.bench_contrastive import NTXent
from benchmarks.contest import PASSES
from benchmarks.floors import Work
from gcrl.config import ModelConfig, ObjectiveConfig
from gcrl.model import GCRL
from gcrl.presets import CIFAR10

# What an H200 copies and multiplies: the same formulas at other rates.
H200 = replace(costs.H100, flops=790e12, bytes=4.3e12)
BF16 = torch.bfloat16


def test_attention_of_128_images_by_hand() -> None:
    forward, backward = costs.attention(128 * 32 * 32, 32, 8 * 64)
    assert forward == Work(4 * 134_217_728, 8_589_934_592)
    assert backward == Work(7 * 134_217_728, 5 * 4_294_967_296)
    assert H200.floor(forward) == pytest.approx(0.1249e-3, rel=1e-3)
    assert H200.floor(backward) == pytest.approx(0.2185e-3, rel=1e-3)
    assert H200.limit(forward) == H200.limit(backward) == "memory"


def test_rows_of_the_crossing_take_as_long_to_move_as_to_multiply() -> None:
    assert costs.crossing(11, 7, H200) == pytest.approx(288.7, rel=1e-3)
    for tensors, products in ((4, 2), (7, 5)):
        length = costs.crossing(tensors, products)
        forward, backward = costs.attention(1000, length, 64)
        work = forward if products == 2 else backward
        assert work.bytes / costs.H100.bytes == pytest.approx(work.flops / costs.H100.flops)


def test_cross_entropy_by_hand() -> None:
    work = costs.linear_cross_entropy(131_072, 512, 512)
    assert work == Work(269_484_032, 206_158_430_208)
    assert H200.floor(work) == pytest.approx(0.261e-3, rel=1e-3)
    assert costs.nearest_color(1000, 512) == (11_000, 3_072_000)


@pytest.mark.parametrize(("views", "seconds"), [(32_768, 0.87e-3), (131_072, 13.9e-3)])
def test_nt_xent_by_hand(views: int, seconds: float) -> None:
    assert costs.nt_xent(views, 128) == 5 * views**2 * 128
    assert costs.nt_xent(views, 128) / H200.flops == pytest.approx(seconds, rel=5e-3)
    assert costs.exponentials(views) == 1.5 * views**2


def test_nt_xent_over_ranks_by_hand() -> None:
    assert costs.nt_xent(4096, 128, ranks=8) == 6 * 4096**2 * 128 / 8
    assert costs.exponentials(4096, ranks=8) == 2 * 4096**2 / 8
    gathered = costs.all_gather(8, 512, 128)
    assert gathered == costs.Gather(7 * 512 * 129 * 4, 8 * 512 * 129 * 4, 1_849_344 / 450e9)
    passed = costs.ring(8, 512, 128)
    assert passed == costs.Gather(7 * 512 * 258 * 4, 2 * 512 * 130 * 4, 3_698_688 / 450e9)
    assert costs.all_gather(16, 512, 128).seconds == pytest.approx(15 * 512 * 129 * 4 / 400e9)
    assert costs.ring(16, 512, 128).seconds == pytest.approx(15 * 512 * 258 * 4 / 50e9)
    assert costs.all_gather(1, 512, 128).received == costs.ring(1, 512, 128).received == 0
    assert costs.all_reduce(4, 1000) == 6000


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("causal", [False, True])
def test_the_benchmarks_count_the_same_work(way: str, causal: bool) -> None:
    both = way == PASSES[1]
    case = Axial(2, (8, 16), 4, 32, 1, causal, BF16)
    forward, backward = costs.attention(2 * 8 * 16, 8.5 if causal else 16, 4 * 32)
    expected = Work(forward.bytes + backward.bytes, forward.flops + backward.flops)
    assert case.work(way) == (expected if both else forward)
    if both:
        linear = CrossEntropy(1024, 96, 32, BF16, True)
        assert linear.work(way) == costs.linear_cross_entropy(1024, 96, 32)
        # The least there is: a GPU's rows have one owner each, who makes the whole square anew.
        least = NTXent(64, 16, BF16).work(way)
        assert least.flops == costs.nt_xent(128, 16) - 128**2 * 16


def test_linear_layers_multiply_as_often_as_torch_counts() -> None:
    config = ModelConfig(grid=(4, 6), colors=7, width=12, heads=3, outer_layers=4, inner_layers=3,
                         mlp_ratio=2, projection_dim=5)  # fmt: skip
    model, tokens = GCRL(config, backend="reference"), torch.randint(7, (3, 4, 6))
    with FlopCounterMode(display=False) as counted:  # our operators are nothing to it
        sum(model(tokens, tokens, ObjectiveConfig())).backward()
    assert counted.get_total_flops() == costs.step_flops(config, 3)[costs.LINEAR]
    assert costs.parameters(config) == sum(p.numel() for p in model.parameters())


def test_attention_of_a_step_by_hand() -> None:
    config = ModelConfig(grid=(4, 6), width=8, heads=2, outer_layers=2, inner_layers=1)
    work = costs.step_work(config, 5)[costs.ATTENTION]
    pixels = 5 * 4 * 6
    # rows of 6 and columns of 4, causal, of two views; rows of 6, causal, of one
    pairs = 2 * pixels * 6 + 2 * pixels * 2.5 + pixels * 3.5
    assert work.flops == 7 * 2 * pairs * 8
    assert work.bytes == 11 * (2 + 2 + 1) * pixels * 8 * 2


def test_a_step_takes_at_least_its_parts() -> None:
    parts = costs.step_work(CIFAR10.model, 256)
    slowest = max(costs.H100.floor(work) for work in parts.values())
    assert slowest < costs.step_floor(CIFAR10.model, 256) < 2 * slowest


@pytest.mark.parametrize(
    ("value", "text"),
    [(536_870_912, "537 MB"), (1.28e-3, "1.28 mB"), (999.6, "1.00 kB"), (0, "0 B"), (12, "12.0 B")],
)
def test_amounts_have_three_digits(value: float, text: str) -> None:
    assert scaling.amount(value, "B") == text


def test_the_document_has_what_the_formulas_and_the_results_give(root: Path) -> None:
    document = (root / "docs" / "scaling.md").read_text(encoding="utf-8")
    made = documents.fill(document, scaling.tables())
    assert made == document, "run python -m benchmarks.scaling --write docs/scaling.md"


def test_a_document_without_a_mark_is_refused(tmp_path: Path, capsys) -> None:
    document = tmp_path / "document.md"
    document.write_text("<!-- attention -->\n<!-- /attention -->\n")
    assert scaling.main(["--write", str(document)]) == 2
    assert (
        "expected <!-- attention-crossing --> and then <!-- /attention-crossing -->"
        in capsys.readouterr().err
    )
    assert document.read_text() == "<!-- attention -->\n<!-- /attention -->\n"


def test_measured_times_are_multiples_of_their_floor(tmp_path: Path) -> None:
    entries = {
        "gcrl_kernels cpu": {"status": "ok", "median": 0.03, "error": 1e-7},
        "gcrl_kernels reference": {"status": "ok", "median": 0.08, "error": 1e-7},
        "PyTorch": {"status": "ok", "median": 0.05, "error": 1e-7},
        "a yardstick": {"status": "ok", "median": 0.01, "error": None},
        "quick": {"status": "wrong", "reason": "the output is 1 off"},
    }
    contest = {"operation": "nt_xent", "case": {"2N": 512, "D": 128}, "pass": "forward",
               "floor": 0.02, "noise": 0.0, "contenders": entries}  # fmt: skip
    machine = {"cpu": "a CPU", "cores": 2, "gpu": None}
    content = {"machine": machine, "threads": 2, "commit": "0123456789abcdef",
               "floors": {"copied byte/s": 42e9}, "contests": [contest]}  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    first, _, *lines = scaling.measured_table([path]).splitlines()
    assert first == "a CPU, 2 threads, commit 0123456789; rates of that run: copied 42.0 Gbyte/s."
    assert lines[-1] == "| `nt_xent` | 2N 512, D 128 | forward | 1.5 | 2.5 |"
    assert "No results" in scaling.measured_table([])
