"""Where a result comes from: machine, versions, commit; and results of `gcrl` with that beside.

    python -m benchmarks.environment FOLDER NAME

writes benchmarks/results/NAME.json: of a run its results.json, config.json and metrics.jsonl, of a
study its study.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "triton", "numpy", "kornia", "scikit-learn", "faiss-cpu", "lightly",
    "pytorch-metric-learning", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn",
    "xformers", "axial-attention", "inf-cl", "siglip-kernel",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Of this process; names no host. GCRL_KERNELS_COMMIT names the commit where git is missing."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = os.environ.get("GCRL_KERNELS_COMMIT", _git("rev-parse", "HEAD"))
    return {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit or None,
        "clean": bool(commit)
        and not _git("status", "--porcelain", "--", ".", ":!benchmarks/results"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(*words: str) -> str:
    """What git says; empty where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _run(folder: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "results": json.loads((folder / "results.json").read_text()),
        "config": json.loads((folder / "config.json").read_text()),
        "metrics": records,
    }


def main(folder: Path, name: str) -> Path:
    study = folder / "study.json"
    found = json.loads(study.read_text()) if study.exists() else _run(folder)
    here = environment()
    content = {**here, **found, "versions": {**here["versions"], **found.get("versions", {})}}
    content["config"].pop("data", None)  # where the images lay
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(main(Path(sys.argv[1]), sys.argv[2]))
