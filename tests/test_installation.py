"""A source tree that is not compiled says so, and what to do, where people would run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from gcrl_kernels.installation import HERE, compiled_elsewhere, warn_if_uncompiled


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree without compiled kernels."""
    folder = tmp_path / "clone"
    (folder / "csrc").mkdir(parents=True)
    (folder / "setup.py").touch()
    shutil.copytree(HERE, folder / HERE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an installed package, whose kernels are compiled."""
    folder = tmp_path / "site"
    shutil.copytree(HERE, folder / HERE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / HERE.name / "libgcrl_kernels_cpu.so").touch()
    (folder / "gcrl_kernels-9.9.dist-info").mkdir()
    (folder / "gcrl_kernels-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gcrl-kernels\nVersion: 9.9\n"
    )
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_tree_that_is_not_compiled_warns(tree: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"slow reference.* Compile the tree's: pip install -e"):
        warn_if_uncompiled(tree / HERE.name)


def test_it_names_the_installed_package(tree: Path, site: Path) -> None:
    assert compiled_elsewhere(tree / HERE.name) == site / HERE.name
    with pytest.warns(RuntimeWarning, match=rf"in {site / HERE.name} has compiled ones.*python -P"):
        warn_if_uncompiled(tree / HERE.name)


def test_installed_packages_do_not_warn(tree: Path, site: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_uncompiled(site / HERE.name)
        shutil.rmtree(tree / "csrc")  # pure Python, as it is installed without a compiler
        warn_if_uncompiled(tree / HERE.name)


def test_the_warning_is_seen_at_import(tree: Path, site: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    words = ["-c", "import gcrl_kernels; print(gcrl_kernels.__file__)"]
    run = lambda *flags: subprocess.run(  # noqa: E731
        [sys.executable, *flags, *words], cwd=tree, env=environment, capture_output=True, text=True
    )
    in_the_tree, outside = run(), run("-P")
    assert in_the_tree.stdout.startswith(str(tree))
    assert in_the_tree.stderr.count("whose kernels are not compiled") == 1
    assert outside.stdout.startswith(str(site))
    assert "RuntimeWarning" not in outside.stderr
