"""`make gpu`: parts with time limits, one after another, and what is left of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from limits import HANG, until_hang

from benchmarks import gpu
from benchmarks.gpu import Log, Part, Unfit, run_all

HOPPER = gpu.Gpu("a card", 9, 0, "2.11.0")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


PASSES = python("print('all is well')")
FAILS = python("print('it broke'); raise SystemExit(3)")
SLEEP = f"import time; time.sleep({HANG})"
SLOW = python(f"print('begun'); {SLEEP}")
# Ends neither by itself nor by an interrupt, nor does its child.
STUBBORN = python(f"""
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "{SLEEP}"]).pid)
{SLEEP}
""")
SHORT = 7  # seconds, which the fixture end_after makes as long as they have to be


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(gpu, "GRACE", HANG)
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    return Log(tmp_path / "out" / "log.txt")


@pytest.fixture
def end_after(log: Log, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Ends a limit of SHORT seconds once the log holds a text, however long that takes here."""

    def set_text(text: str) -> None:
        class Popen(subprocess.Popen[bytes]):
            def wait(self, timeout: float | None = None) -> int:
                if timeout != SHORT:
                    return super().wait(timeout)
                for _ in until_hang():
                    if re.search(text, Path(log.file.name).read_text()):
                        break
                raise subprocess.TimeoutExpired(self.args, timeout)

        monkeypatch.setattr(gpu.subprocess, "Popen", Popen)

    return set_text


def outcomes(parts: list[Part], log: Log, limit: float = 9 * HANG) -> list[tuple[str, str, str]]:
    return [(o.name, o.status, o.note) for o in run_all(parts, limit, log)]


def test_each_part_runs_whatever_became_of_the_one_before(log: Log, end_after) -> None:
    end_after("begun")
    parts = [
        Part("one", FAILS, HANG),
        Part("two", SLOW, SHORT),
        Part("three", PASSES, HANG, "no hands here"),
        Part("four", PASSES, HANG, remark="half of it"),
        Part("five", PASSES),
    ]
    assert outcomes(parts, log) == [
        ("one", "failed", "it broke"),
        ("two", "timed out", "KeyboardInterrupt"),
        ("three", "not run", "no hands here"),
        ("four", "passed", "half of it; all is well"),
        ("five", "passed", "all is well"),
    ]
    text = Path(log.file.name).read_text()
    words = ("it broke", "begun", "timed out", "no hands here", "half of it", "=== five")
    positions = [text.index(word) for word in words]
    assert positions == sorted(positions)


def test_what_does_not_heed_an_interrupt_is_ended_with_its_children(
    log: Log, end_after, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1)
    end_after(r"(?m)^\d+$")
    ((_, status, child),) = outcomes([Part("stubborn", STUBBORN, SHORT)], log)
    assert status == "timed out"
    for _ in until_hang():
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break


def test_a_limit_leaves_the_results_of_the_tests_so_far(
    log: Log, end_after, tmp_path: Path
) -> None:
    (tmp_path / "test_two.py").write_text(
        f"def test_quick(): pass\ndef test_slow():\n    print('begun')\n    {SLEEP}\n"
    )
    end_after("begun")
    flags = [
        "-v",
        "-s",
        "-c",
        "/dev/null",
        "-p",
        "no:cacheprovider",
        f"--junitxml={tmp_path / 'x.xml'}",
    ]
    part = Part("tests", [*gpu.PYTEST, *flags, str(tmp_path / "test_two.py")], SHORT)
    ((_, status, note),) = outcomes([part], log)
    assert status == "timed out"
    assert "1 passed" in note
    assert 'name="test_quick"' in (tmp_path / "x.xml").read_text()
    assert "test_quick PASSED" in Path(log.file.name).read_text()


def test_parts_without_a_limit_share_the_rest_evenly(log: Log) -> None:
    parts = [Part("one", PASSES, 3 * HANG), Part("two", PASSES), Part("three", PASSES)]
    outcome = outcomes(parts, log, limit=11 * HANG)  # one HANG is the GRACE
    assert [status for _, status, _ in outcome] == ["passed"] * 3
    limits = map(int, re.findall(r"at most (\d+) s", Path(log.file.name).read_text()))
    one, two, three = limits
    assert one == 3 * HANG
    assert 4 * HANG <= two <= 5 * HANG  # half of the rest, less what the part before it took
    assert two + 3 * HANG <= three <= 10 * HANG  # what the second left is the third's


def test_none_starts_without_time(log: Log) -> None:
    parts = [Part("one", PASSES, HANG), Part("two", PASSES)]
    assert {status for _, status, _ in outcomes(parts, log, limit=1)} == {"not run"}


def test_the_kernels_are_found_beside_what_is_there_already(
    log: Log, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    ((_, _, note),) = outcomes(
        [Part("path", python("import os; print(os.environ['PYTHONPATH'])"), HANG)], log
    )
    assert note == f"{root}:{root}/python:/elsewhere"


@pytest.mark.parametrize(("command", "status"), [(PASSES, 0), (FAILS, 1), (SLOW, 1)])
def test_the_summary_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, command: list[str], status: int
) -> None:
    limit = 0.01 if command is SLOW else HANG
    parts = [Part("build", command, limit), Part("tests", PASSES, HANG), Part("bench_it", PASSES)]
    monkeypatch.setattr(gpu, "find_gpu", lambda: HOPPER)
    monkeypatch.setattr(gpu, "list_parts", lambda *_: parts)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.delenv("GCRL_KERNELS_ARCHITECTURES", raising=False)
    assert gpu.main(["--out", str(tmp_path / "out"), "--limit", str(9 * HANG)]) == status
    assert os.environ["GCRL_KERNELS_ARCHITECTURES"] == "9.0a"
    text = (tmp_path / "out" / "log.txt").read_text()
    assert text.startswith("a card, compute capability 9.0a, PyTorch 2.11.0\n")
    assert capsys.readouterr().out == text
    table = [line.split()[:2] for line in text.splitlines()[-3:]]
    first = "failed" if command is FAILS else "timed" if command is SLOW else "passed"
    assert table == [["build", first], ["tests", "passed"], ["bench_it", "passed"]]


def test_a_signal_ends_the_part_and_leaves_a_summary(tmp_path: Path, root: Path) -> None:
    code = f"""
import sys
from benchmarks import gpu
gpu.find_gpu = lambda: gpu.Gpu("a card", 9, 0, "2.11.0")
gpu.list_parts = lambda *_: [gpu.Part("one", {SLOW!r}), gpu.Part("two", {PASSES!r})]
sys.exit(gpu.main(["--out", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen(python(code), cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "begun\n":
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG) == 1
    process.stdout.close()
    text = (tmp_path / "log.txt").read_text()
    assert re.search(r"^one +interrupted", text, re.MULTILINE)
    assert "all is well" not in text


def refusal(root: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", "/nonexistent/gpu"],
        cwd=root,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_without_a_gpu_it_says_so_in_a_line(root: Path) -> None:
    line = refusal(root, CUDA_VISIBLE_DEVICES="")
    assert re.fullmatch("an NVIDIA GPU and PyTorch .*PyTorch .* finds no NVIDIA GPU", line)


def test_without_pytorch_it_says_so_in_a_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    line = refusal(root, PYTHONPATH=str(tmp_path))
    assert line == "an NVIDIA GPU and PyTorch are needed: ImportError: none here"


@pytest.mark.parametrize(("capability", "name"), [((8, 6), "8.6"), ((9, 0), "9.0a")])
def test_architecture(capability: tuple[int, int], name: str) -> None:
    assert gpu.Gpu("a card", *capability, "2.11.0").architecture == name


def test_every_test_and_benchmark_has_its_part(root: Path, tmp_path: Path) -> None:
    parts = gpu.list_parts(tmp_path, 1, 2)
    names = [part.name for part in parts]
    benchmarks = sorted(file.stem for file in root.glob("benchmarks/bench_*.py"))
    assert benchmarks
    assert names == ["build", "kernels", "tests", *benchmarks]
    files = [word for word in parts[2].command if word.startswith("tests/")]
    assert sorted(files) == sorted(f"tests/{path.name}" for path in root.glob("tests/test_*.py"))
    training = [file.startswith("tests/test_gcrl") for file in files]
    assert training == sorted(training)
    chosen = gpu.choose(parts, ["benchmarks", "tests"])
    assert [part.name for part in chosen] == ["tests", *benchmarks]
    assert [part.name for part in gpu.choose(parts, [benchmarks[0]])] == benchmarks[:1]
    with pytest.raises(Unfit, match=r"parts: expected some of .*benchmarks.*, got 'speed'"):
        gpu.choose(parts, ["speed"])


def test_a_build_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    part = gpu.build_part(1)
    assert part.obstacle is None
    assert part.remark == "C++ alone: no nvcc of CUDA 12 or newer was found"
    monkeypatch.setitem(sys.modules, "setuptools", None)
    obstacle = gpu.build_part(1).obstacle
    assert obstacle is not None
    assert obstacle.startswith("setup.py cannot be run: ")
    assert "setuptools" in obstacle


def test_the_makefile_has_the_same_limits(root: Path) -> None:
    text = (root / "Makefile").read_text()
    given = {name: int(value) for name, value in re.findall(r"^(\w*LIMIT) \?= (\d+)$", text, re.M)}
    assert given == {name: getattr(gpu, name) for name in ("LIMIT", "BUILD_LIMIT", "TESTS_LIMIT")}
    assert gpu.LIMIT <= 28 * 60
    rest = gpu.LIMIT - gpu.BUILD_LIMIT - gpu.KERNELS_LIMIT - gpu.TESTS_LIMIT
    assert rest >= gpu.LIMIT / 2  # for the benchmarks
