"""The report on the benchmarks' results: its tables, its charts, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import charts, report
from benchmarks.documents import fill

MIB = 2**20
START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
CASE = {"M": 1024, "K": 32, "dtype": "float32"}


def ok(milliseconds: float, mib: float | None = 3, error: float | None = 1e-7) -> dict[str, Any]:
    peak = None if mib is None else int(mib * MIB)
    return {"status": "ok", "median": milliseconds / 1e3, "peak_bytes": peak, "error": error}


def contest(
    contenders: dict[str, dict[str, Any]], *, way: str = "forward", noise: float = 0.01, **case: Any
) -> dict[str, Any]:
    """An operation's contest with a floor of 1 ms."""
    return {
        "operation": "quantize_colors", "case": {**CASE, **case}, "pass": way, "floor": 1e-3,
        "noise": noise, "contenders": contenders,
    }  # fmt: skip


OURS = {"gcrl_kernels cpu": ok(2, 0.5), "gcrl_kernels reference": ok(8)}
PEERS = {"PyTorch": ok(6), "FAISS": ok(3)}
BOTH = contest({**OURS, **PEERS})


def write(path: Path, *contests: dict[str, Any], gpu: str | None = None) -> Path:
    content = {
        "machine": {"cpu": "a CPU", "cores": 4, "gpu": gpu},
        "threads": 2,
        "versions": {"python": "3.11", "torch": "2.13"},
        "commit": "0123456789abcdef",
        "clean": False,
        "floors": {"copied byte/s": 16.84e9, "float32 flop/s": 1.5e12},
        "contests": contests,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path):
    """A run of the contests, read back from a file."""
    return lambda *contests, **options: report.load(
        write(tmp_path / "run.json", *contests, **options)
    )


def rows(table: str) -> list[list[str]]:
    """The cells below a table's head."""
    return [line[2:-2].split(" | ") for line in table.splitlines()[2:]]


def test_our_best_stands_beside_the_fastest_peer(run) -> None:
    contests = run(BOTH).operations["quantize_colors"]
    assert rows(report.comparison(contests, gpu=False)) == [
        ["M 1024, K 32, float32", "forward", "**1.50× ahead of** FAISS", "cpu",
         "50% / 33%", "<1 MiB / 3.00 MiB", "1%"]
    ]  # fmt: skip
    assert report.everyone(contests, gpu=False).splitlines() == [
        "| case | pass | gcrl_kernels cpu | gcrl_kernels reference | PyTorch | FAISS |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| M 1024, K 32, float32 | forward | **1.00×** | 4.00× | 3.00× | 1.50× |",
    ]


def test_a_gpu_has_milliseconds_too(run) -> None:
    contests = run(BOTH, gpu="a GPU").operations["quantize_colors"]
    assert rows(report.comparison(contests, gpu=True))[0][4] == "1.00 / 2.00 / 3.00"
    assert rows(report.everyone(contests, gpu=True))[0][-1] == "1.50× (3.00 ms)"


@pytest.mark.parametrize(
    "peer, noise, expected",
    [
        (1.6, 0.01, "1.25× behind FAISS"),
        (1.6, 0.23, "level with FAISS"),  # log 1.25 = 0.223
        (2.03, 0.0, "level with FAISS"),
        (2.1, 0.0, "**1.05× ahead of** FAISS"),
        (30, float("nan"), "**15.0× ahead of** FAISS"),
    ],
)
def test_a_difference_counts_beyond_the_noise(
    run, peer: float, noise: float, expected: str
) -> None:
    (found,) = run(contest({**OURS, "FAISS": ok(peer)}, noise=noise)).operations["quantize_colors"]
    assert report.verdict(found) == expected


def test_the_fastest_of_all_is_bold(run) -> None:
    contests = run(contest({**OURS, "FAISS": ok(1.6)})).operations["quantize_colors"]
    assert rows(report.everyone(contests, gpu=False))[0][2:] == ["1.00×", "4.00×", "**0.800×**"]


def test_none_of_ours(run) -> None:
    contests = run(contest(PEERS)).operations["quantize_colors"]
    assert rows(report.comparison(contests, gpu=False))[0][2:] == [
        "none of ours succeeded", "–", "– / 33%", "– / 3.00 MiB", "1%"
    ]  # fmt: skip
    assert rows(report.everyone(contests, gpu=False))[0][2:] == ["2.00×", "**1.00×**"]


def test_no_peer_and_no_memory(run) -> None:
    contests = run(contest({"gcrl_kernels cpu": ok(2, None)})).operations["quantize_colors"]
    assert rows(report.comparison(contests, gpu=True))[0][2:] == [
        "no peer succeeded", "cpu", "1.00 / 2.00 / –", "50% / –", "– / –", "1%"
    ]  # fmt: skip


def test_nobody(run) -> None:
    nobody = contest({"FAISS": {"status": "failed", "reason": "no"}}, M=2)
    contests = run(nobody, BOTH).operations["quantize_colors"]
    assert rows(report.comparison(contests, gpu=True))[0][2:] == [
        "none of ours succeeded", "–", "1.00 / – / –", "– / –", "– / –", "1%"
    ]  # fmt: skip
    assert rows(report.everyone(contests, gpu=True))[0][2:] == ["–", "–", "failed", "–"]


def test_a_yardstick_is_no_peer(run) -> None:
    contests = run(contest({**OURS, **PEERS, "bare products": ok(1, error=None)}))
    contests = contests.operations["quantize_colors"]
    assert report.verdict(contests[0]) == "**1.50× ahead of** FAISS"
    assert rows(report.everyone(contests, gpu=False))[0][-1] == "*0.500×*"


def test_what_all_cases_share_is_in_the_head(run) -> None:
    contests = run(
        BOTH, contest(PEERS, way="forward+backward"), contest(PEERS, M=4096, causal=True)
    ).operations["quantize_colors"]
    table = report.comparison(contests, gpu=False)
    assert table.startswith("| case: K 32, float32 | pass |")
    assert [row[:2] for row in rows(table)] == [
        ["M 1024", "forward"], ["", "forward+backward"], ["M 4096, causal", "forward"]
    ]  # fmt: skip


def test_where_the_time_goes_is_told_by_those_that_know(run) -> None:
    def knows(milliseconds: float, **where: float) -> dict[str, Any]:
        return {**ok(milliseconds), "images_per_second": 4 / milliseconds * 1e3, "where": where}

    step = contest({"gcrl_kernels eager": knows(2, attention=0.25, rest=0.75),
                    "PyTorch": ok(3), "lightly": knows(4, rest=1.0)})  # fmt: skip
    (table,) = report.breakdown(run(step).operations["quantize_colors"], gpu=False)
    assert table.splitlines()[0] == "| case | contender | time | attention | rest |"
    assert [row[1:] for row in rows(table)] == [
        ["gcrl_kernels eager", "1.00×", "25%", "75%"], ["lightly", "2.00×", "–", "100%"]
    ]  # fmt: skip
    (table,) = report.breakdown(run(step, gpu="H200").operations["quantize_colors"], gpu=True)
    assert rows(table)[0][1:3] == ["gcrl_kernels eager", "2000"]
    assert report.breakdown(run(BOTH).operations["quantize_colors"], gpu=False) == []


def test_who_is_left_out_is_told_once_with_the_reason(run) -> None:
    absent = {"lightly": {"status": "skipped", "reason": "lightly is not installed"}}
    wrong = {"FAISS": {"status": "wrong", "reason": "the output is 0.1 off,\n`x` is allowed"}}
    contests = run(
        contest({**OURS, **absent, **wrong}), contest({**OURS, **absent, **PEERS}, M=8),
        contest({**OURS, **absent, "FAISS": {"status": "failed", "reason": "no"}}, M=9),
        contest({**OURS, **absent, "FAISS": {"status": "failed", "reason": "no"}}, M=10),
    ).operations["quantize_colors"]  # fmt: skip
    assert report.left_out(contests) == [
        "- FAISS wrong: `the output is 0.1 off, 'x' is allowed` (M 1024, K 32, float32, forward)\n"
        "- FAISS failed: `no` (2 of 4)\n"
        "- lightly skipped: `lightly is not installed`"
    ]
    faiss_and_pytorch = [row[-2:] for row in rows(report.everyone(contests, gpu=False))]
    assert faiss_and_pytorch[:3] == [["wrong", "–"], ["1.50×", "3.00×"], ["failed", "–"]]


def test_the_headline_has_rates_versions_and_commit(run, tmp_path: Path) -> None:
    assert report.headline(run(BOTH), tmp_path / "docs") == (
        "Copies 16.8 GB/s, multiplies 1.50 TFLOP/s in float32. "
        "python 3.11, torch 2.13, commit 0123456789 with changes: [run.json](../run.json)."
    )
    assert run(BOTH).machine == "a CPU, 2 threads"
    assert run(BOTH, gpu="a GPU").machine == "a GPU"


def test_the_short_form_has_the_main_cases_in_order(run) -> None:
    sizes = [contest(PEERS, M=m) for m in (64, 16, 32)]
    others = [contest(PEERS, dtype="bfloat16"), contest(PEERS, K=7, M=5)]
    text = report.short([run(*others, *sizes)], Path())
    assert re.findall(r"^\| (M \d+) ", text, re.MULTILINE) == ["M 16", "M 32", "M 64"]
    assert "`quantize_colors`, 3 of 5 cases. Peers: PyTorch; FAISS.\n" in text


def case(batch: int, grid: str, axis: str = "rows", *, causal: bool = False) -> dict[str, Any]:
    return {"batch": batch, "grid": grid, "axis": axis, "causal": causal}


@pytest.mark.parametrize(
    "cases, expected",
    [
        ([{"M": m, "K": 2} for m in (4, 1, 2)], [("M", [1, 2, 0])]),
        ([{"M": m, "K": 2} for m in (4, 1)], []),
        (  # the longer one first; they share a case
            [{"M": 1, "K": 1}, *({"M": 2, "K": k} for k in (1, 2, 3, 4)), {"M": 3, "K": 1}],
            [("K", [1, 2, 3, 4]), ("M", [0, 1, 5])],
        ),
        (  # the batch shrinks as the image grows; the other way to look has two sizes alone
            [case(8, "32x32"), case(128, "8x8"), case(2, "64x64"), case(1, "16x16", "columns"),
             case(2, "8x8", "columns"), case(8, "32x32", causal=True)],
            [("grid", [1, 0, 2])],
        ),
        ([{"dtype": name} for name in ("float32", "float16", "bfloat16")], []),
    ],
)  # fmt: skip
def test_a_series_is_what_grows_while_all_else_is_equal(
    cases: list[dict[str, Any]], expected: list[tuple[str, list[int]]]
) -> None:
    found = charts.longest_series(cases)
    assert [(field, [cases.index(c) for c in members]) for field, members in found] == expected


def test_a_case_in_words() -> None:
    assert charts.describe(case(8, "32x32", causal=True)) == "batch 8, 32x32, rows, causal"
    assert charts.describe(case(8, "32x32"), ["axis", "causal"]) == "rows"
    assert charts.describe(case(8, "32x32"), ["causal"]) == "not causal"
    assert charts.describe(CASE, []) == ""


def test_names_of_lines_do_not_touch() -> None:
    heights = {"a": 0.5, "b": 0.52, "c": 0.1, "d": 0.51}
    apart = charts._apart(heights, 0.1)
    assert apart == pytest.approx({"c": 0.1, "a": 0.41, "d": 0.51, "b": 0.61})


def test_the_same_results_make_the_same_charts(run, tmp_path: Path) -> None:
    first, again = (
        charts.draw(run({**contest(PEERS), "operation": "nt_xent"}), tmp_path / name)
        for name in ("first", "again")
    )
    assert first == again
    names = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("gpu", [None, "a GPU"])
def test_each_chart_is_a_pair_and_shown(
    tmp_path: Path, gpu: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    series = [contest({**OURS, **PEERS}, M=m, way=w) for m in (1, 2, 4) for w in ("forward", "b")]
    del series[-1]["contenders"]["FAISS"]  # its line ends early
    lone = {**contest(PEERS), "operation": "nt_xent"}
    path, docs = write(tmp_path / "run.json", *series, lone, gpu=gpu), tmp_path / "docs"
    assert report.main([str(path), "--out", str(docs)]) == 0
    written = {file.name: file.read_bytes() for file in docs.iterdir()}
    text = written.pop("README.md").decode()
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert sorted(shown) == sorted(written)
    kinds = ["cases", "time", "floor", "memory"]
    assert [name for name in shown if "quantize" in name and "light" in name] == [
        f"run-quantize_colors-{kind}-light.svg" for kind in kinds
    ]
    assert ("run-nt_xent-time-dark.svg" in shown) == (gpu is not None)
    for name, content in written.items():
        words = {element.text for element in ElementTree.fromstring(content).iter()}
        assert "PyTorch" in words, name
    assert "picture" not in capsys.readouterr().out


def test_an_operation_that_nobody_could_do_has_no_chart(tmp_path: Path) -> None:
    nobody = contest({"FAISS": {"status": "failed", "reason": "no"}})
    path = write(tmp_path / "run.json", nobody)
    assert report.main([str(path), "--out", str(tmp_path / "docs")]) == 0
    assert [file.name for file in (tmp_path / "docs").iterdir()] == ["README.md"]


def test_the_readme_has_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, readme = write(tmp_path / "run.json", BOTH), tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert report.main([str(path), "--readme", str(readme)]) == 0
        printed = capsys.readouterr().out
        assert "**1.50× ahead of** FAISS" in printed
        assert readme.read_text(encoding="utf-8") == (
            f"before\n{START}\n\n{printed}\n{END}\nafter\n"
        )


@pytest.mark.parametrize("content", ["", START, f"{END} {START}"])
def test_a_readme_without_the_marks_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path, readme = write(tmp_path / "run.json", BOTH), tmp_path / "README.md"
    readme.write_text(content, encoding="utf-8")
    assert report.main([str(path), "--readme", str(readme)]) == 2
    output = capsys.readouterr()
    assert f"{readme}: expected {START}" in output.err
    assert (output.out, readme.read_text(encoding="utf-8")) == ("", content)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "got something else"),
        ('{"machine_info": {}, "benchmarks": []}', "pytest-benchmark's own"),
        ('{"machine": {}, "config": {}, "metrics": []}', "a training run's record"),
        ('{"contests": 3}', "damaged"),
        ('{"contests": [{"operation": "nt_xent"}]}', "damaged one: no 'case'"),
        ('{"contests": []}', "damaged one: no 'machine'"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("field", ["median", "peak_bytes", "error", "status"])
def test_a_damaged_contender_is_refused(tmp_path: Path, field: str) -> None:
    entry = ok(3)
    del entry[field]
    path = write(tmp_path / "run.json", contest({**OURS, "FAISS": entry}))
    with pytest.raises(report.ReportError, match=f"damaged one: no '{field}'"):
        report.load(path)


def test_a_run_without_contests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="nothing was measured"):
        report.load(write(tmp_path / "run.json"))


def test_charts_of_files_of_one_name_would_overwrite_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    paths = [write(folder / "run.json", BOTH) for folder in (tmp_path, tmp_path / "other")]
    assert report.main([*map(str, paths), "--out", str(tmp_path / "docs")]) == 2
    assert "different names" in capsys.readouterr().err


def test_runs_on_one_machine_have_one_heading(tmp_path: Path) -> None:
    runs = [report.load(write(tmp_path / name, BOTH)) for name in ("a.json", "b.json")]
    text = report.full(runs, tmp_path)
    assert text.count("## a CPU, 2 threads\n") == 1
    assert "[a.json](a.json)" in text
    assert "[b.json](b.json)" in text


def test_the_command_helps(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--help"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for word in ("--out", "--readme", "pytest benchmarks --results"):
        assert word in done.stdout


def test_old_results_are_refused(root: Path) -> None:
    for name in ("train_digits.json", "quantize_colors_cpu.json"):
        path = root / "benchmarks" / "results" / name
        if path.exists():
            with pytest.raises(report.ReportError, match="pytest benchmarks --results"):
                report.load(path)


def test_the_projects_readme_has_what_the_report_prints(root: Path) -> None:
    readme = root / "README.md"
    section = readme.read_text(encoding="utf-8").partition(START)[2]
    if not section:
        pytest.skip(f"README.md has no {START}")
    names = re.findall(r"\]\(([^)]+\.json)\)", section.partition(END)[0])
    paths = [root / name for name in names]
    missing = [str(path) for path in paths if not path.exists()]
    if missing or not paths:
        pytest.skip(f"README.md names results that are not there: {', '.join(missing) or 'none'}")
    text = report.short([report.load(path) for path in paths], root)
    assert fill(readme.read_text(encoding="utf-8"), {report.MARK: text}) == readme.read_text(
        encoding="utf-8"
    )
