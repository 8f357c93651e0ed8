"""Where a package is not installed, what needs it is skipped and says so; in CI it is an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

ABSENT = """
import os, sys
sys.modules.update(dict.fromkeys(os.environ["ABSENT"].split()))
"""


@pytest.fixture
def without(root: Path, tmp_path: Path):
    """The outcome of pytest with some packages absent."""

    def collect(packages: str, *words: str, ci: str = "") -> subprocess.CompletedProcess[str]:
        (tmp_path / "absent.py").write_text(ABSENT)
        flags = ("-q", "-p", "absent", "-p", "no:hypothesispytest", "-p", "no:cacheprovider")
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        variables = {"ABSENT": packages, "CI": ci, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "pytest", *flags, *words],
            cwd=root,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=HANG,
        )

    return collect


def test_no_file_of_the_kernels_is_skipped(without, root: Path) -> None:
    packages = "kornia matplotlib PIL safetensors sklearn tensorboard torchmetrics tqdm tyro"
    done = without(f"{packages} hypothesis", "--collect-only", "tests")
    assert done.returncode == 0, done.stdout
    skipped = set(re.findall(r"SKIPPED .*: (test_\w+\.py) needs \w+, which is not", done.stdout))
    collected = set(re.findall(r"^tests/(test_\w+\.py)::", done.stdout, re.MULTILINE))
    assert {"test_gcrl_views.py", "test_gcrl_cli.py"} <= skipped
    assert all(name.startswith(("test_gcrl_", "test_benchmarks_")) for name in skipped)
    assert skipped | collected == {path.name for path in root.glob("tests/test_*.py")}


def test_a_test_is_skipped_for_what_it_imports(without) -> None:
    done = without("sklearn hypothesis", "-n0", "tests/test_quantize_colors.py")
    assert done.returncode == 0, done.stdout
    assert "[128-clustered] needs sklearn, which is not installed" in done.stdout
    assert re.search(r"SKIPPED .*: hypothesis is not installed", done.stdout)
    assert re.search(r"\d\d passed, 6 skipped", done.stdout)


@pytest.mark.parametrize("package, file", [("kornia", "views"), ("hypothesis", "config")])
def test_ci_has_every_package(without, package: str, file: str) -> None:
    done = without(package, "--collect-only", f"tests/test_gcrl_{file}.py", ci="true")
    assert done.returncode != 0
    assert f"ModuleNotFoundError: import of {package} halted" in done.stdout + done.stderr


def test_another_missing_module_is_an_error(without) -> None:
    done = without("gcrl.config", "--collect-only", "tests/test_gcrl_config.py")
    assert done.returncode != 0
    assert "ModuleNotFoundError: import of gcrl.config halted" in done.stdout
