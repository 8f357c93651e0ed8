"""What there is to run on a machine with a GPU: the build, the kernels' state, tests, benchmarks.

    python -m benchmarks.gpu --out build/gpu

takes the machine as it is, with its own Python and PyTorch; nothing is installed or fetched. The
kernels are compiled in place, the CUDA library for this GPU alone. Parts come one after another,
each in a process of its own with a time limit; when that runs out the part is interrupted and the
next one starts. The folder then holds, each written as it comes to be:

    log.txt            what every part printed, and how it ended
    tests.xml          the tests, as JUnit
    <benchmark>.json   a file's results, contest by contest

The exit status is 0 if every part passed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
LIMIT, BUILD_LIMIT, TESTS_LIMIT = 1680, 240, 480  # seconds
KERNELS_LIMIT = 60
GRACE = 20  # seconds from a part's interruption, in which it writes what it has, to its end
LEAST = 5  # seconds; with less left a part does not start
WORKERS = 8  # at most, for the tests
PYTEST = [sys.executable, "-m", "pytest"]

ASK = """
import json, torch
if torch.version.cuda is None or not torch.cuda.is_available():
    raise SystemExit(f"PyTorch {torch.__version__} finds no NVIDIA GPU")
major, minor = torch.cuda.get_device_capability()
print(json.dumps([torch.cuda.get_device_name(), major, minor, torch.__version__]))
"""
KERNELS = """
import sys, time
from gcrl_kernels.__main__ import report
from gcrl_kernels.backends import LIBRARIES, unavailable
for library in LIBRARIES.values():
    if library.exists():
        print(library.name, "was built", time.ctime(library.stat().st_mtime))
print(report())
sys.exit(unavailable("cuda"))
"""


class Unfit(Exception):
    """This machine cannot run any of it; the message says why."""


@dataclass(frozen=True)
class Gpu:
    name: str
    major: int
    minor: int
    torch: str

    @property
    def architecture(self) -> str:
        """As setup.py takes it; from Hopper on with the instructions of that generation alone."""
        return f"{self.major}.{self.minor}" + ("a" if self.major >= 9 else "")


@dataclass(frozen=True)
class Part:
    """A command with a time limit in seconds; without one it shares what is left evenly."""

    name: str
    command: Sequence[str]
    limit: float | None = None
    obstacle: str | None = None  # why it cannot run here
    remark: str = ""  # what to know of it even if it passes
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # "passed", "failed", "timed out", "interrupted" or "not run"
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name:<24}{self.status:<12}{self.seconds:7.1f} s   {self.note}".rstrip()


class Log:
    """A file that is added to, and standard output; both at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        self.file.write(data)
        with suppress(OSError):  # nobody reads it any more
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def line(self, text: str = "") -> None:
        self.write(f"{text}\n".encode())


def find_gpu() -> Gpu:
    """Asks a process of its own, so that this one holds no memory of the GPU."""
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
        raise Unfit(f"an NVIDIA GPU and PyTorch are needed: {reason}")
    return Gpu(*json.loads(asked.stdout.splitlines()[-1]))


def build_part(limit: float) -> Part:
    """setup.py in place; where it cannot build a library, one that is there already is used."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {"GCRL_KERNELS_BUILD": "1"}  # no compiler is an error
    spec = spec_from_file_location("gcrl_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = module_from_spec(spec)
    try:
        spec.loader.exec_module(setup)
    except ImportError as error:
        obstacle = f"setup.py cannot be run: {error}"
        return Part("build", command, limit, obstacle, environment=environment)
    nvcc = "" if setup.find_nvcc() else "C++ alone: no nvcc of CUDA 12 or newer was found"
    return Part("build", command, limit, remark=nvcc, environment=environment)


def tests_part(out: Path, limit: float) -> Part:
    """Every test, the kernels' first, so that the others cannot take their time."""
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda p: (p.name.startswith("test_gcrl"), p))
    flags = ["-v", "-o", "faulthandler_timeout=120", f"--junitxml={out / 'tests.xml'}"]
    environment = {}
    if find_spec("xdist"):
        flags += ["-n", str(min(WORKERS, len(os.sched_getaffinity(0))))]
        environment["OMP_NUM_THREADS"] = "1"
    command = [*PYTEST, *flags, *(str(file.relative_to(ROOT)) for file in files)]
    return Part("tests", command, limit, environment=environment)


def benchmark_part(file: Path, out: Path) -> Part:
    results = out / f"{file.stem.removeprefix('bench_')}.json"
    command = [*PYTEST, "-v", str(file.relative_to(ROOT)), "--results", str(results)]
    missing = None if find_spec("pytest_benchmark") else "pytest-benchmark is not installed"
    return Part(file.stem, command, obstacle=missing)


def list_parts(out: Path, build_limit: float, tests_limit: float) -> list[Part]:
    """All there is, in order."""
    return [
        build_part(build_limit),
        Part("kernels", [sys.executable, "-c", KERNELS], KERNELS_LIMIT),
        tests_part(out, tests_limit),
        *(benchmark_part(file, out) for file in sorted(ROOT.glob("benchmarks/bench_*.py"))),
    ]


def choose(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The named parts, in their order; "benchmarks" are all of those."""
    known = {part.name for part in parts} | {"benchmarks"}
    for name in names:
        if name not in known:
            raise Unfit(f"parts: expected some of {', '.join(sorted(known))}, got {name!r}")
    benchmarks = "benchmarks" in names
    return [p for p in parts if p.name in names or (benchmarks and p.name.startswith("bench_"))]


def run_all(parts: Sequence[Part], limit: float, log: Log) -> Iterator[Outcome]:
    """Runs the parts, none past `limit` seconds from now; how each ended, once it has."""
    end = time.monotonic() + limit - GRACE
    for index, part in enumerate(parts):
        left = max(0.0, end - time.monotonic())
        share = left / len(parts[index:]) if part.limit is None else min(part.limit, left)
        log.line(f"\n=== {part.name}, at most {share:.0f} s")
        if part.obstacle is not None:
            outcome = Outcome(part.name, "not run", note=part.obstacle)
        elif left < LEAST:
            outcome = Outcome(part.name, "not run", note="no time is left")
        else:
            outcome = run(part, share, log)
        log.line(f"=== {outcome}")
        yield outcome


def run(part: Part, limit: float, log: Log) -> Outcome:
    """Runs one part; it is interrupted as by Ctrl-C when the limit is over, or when we are."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    folders = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    start = time.monotonic()
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A command in a shell's background ignores interrupts, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    last = [""]
    reader = threading.Thread(target=_copy, args=(process.stdout, log, last), daemon=True)
    reader.start()
    try:
        status = "failed" if process.wait(limit) else "passed"
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        status = "interrupted" if isinstance(reason, KeyboardInterrupt) else "timed out"
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, if it must be, and what it left running
        process.wait()
    reader.join(GRACE)
    note = "; ".join(filter(None, [part.remark, last[0]]))
    return Outcome(part.name, status, time.monotonic() - start, note)


def _copy(source: IO[bytes], log: Log, last: list[str]) -> None:
    for line in source:
        log.write(line)
        text = line.decode(errors="replace").strip(" =\n")
        if text:
            last[0] = text[:200]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu", help="the folder of what a run leaves")
    add("--parts", nargs="+", help="build, kernels, tests, benchmarks or one of those by its name")
    add("--limit", type=float, default=LIMIT, help="seconds for everything")
    add("--build-limit", type=float, default=BUILD_LIMIT, help="seconds for the build")
    add("--tests-limit", type=float, default=TESTS_LIMIT, help="seconds for the tests")
    options = parser.parse_args(arguments)
    try:
        gpu = find_gpu()
        if find_spec("pytest") is None:
            raise Unfit("pytest is needed")
        parts = list_parts(options.out.resolve(), options.build_limit, options.tests_limit)
        if options.parts:
            parts = choose(parts, options.parts)
    except Unfit as reason:
        print(reason, file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    os.environ["GCRL_KERNELS_ARCHITECTURES"] = gpu.architecture
    log = Log(options.out / "log.txt")
    log.line(f"{gpu.name}, compute capability {gpu.architecture}, PyTorch {gpu.torch}")
    outcomes = []
    for outcome in run_all(parts, options.limit, log):
        outcomes.append(outcome)
        if outcome.status == "interrupted":
            break
    log.line("\n" + "\n".join(map(str, outcomes)))
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
