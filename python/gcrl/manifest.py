"""What a checkpoint depends on beside its own files, so that nothing of it changes unnoticed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from gcrl.checkpoint import CheckpointError
from gcrl.config import Config

# Settings that may be others when a run goes on or is used: none changes what was computed. (The
# training images themselves are compared, so that they may have moved.)
FREE = {
    "preset", "data", "download", "max_gigabytes",
    "evaluate", "probe_train", "probe_test", "neighbors", "sample_count",
    "device", "backend", "compile", "timeout", "log_every", "checkpoint_every",
}  # fmt: skip
# And those that may be changed on purpose: the run says so, and goes on.
ADJUSTABLE = {"steps"}


def manifest(config: Config, palette: Tensor) -> dict[str, Any]:
    """What is kept of a run in each checkpoint; palette [K, 3]."""
    return {"config": config.to_dict(), "palette": palette_digest(palette)}


def check(saved: Path, state: dict[str, Any], config: Config, palette: Tensor) -> list[str]:
    """The adjustable settings that changed since the checkpoint was saved, in words.

    Raises CheckpointError where anything else did that is not free.
    """
    before = Config.from_dict(state.get("config"), f"{saved}: config").flat()
    before["palette"] = config.data.palette  # a path; what it holds is compared below
    changes = changed_settings(before, config.flat())
    differing = [text for name, text in changes.items() if name not in ADJUSTABLE]
    if state.get("palette") != palette_digest(palette):
        differing.append("palette.npy holds other colours")
    if differing:
        raise CheckpointError(
            f"{saved}: does not belong to what lies beside it: {'; '.join(differing)}"
        )
    return list(changes.values())


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """By the name of its flag, each setting that is not free and was another, in words."""
    return {
        name: f"{name} was {before[name]!r}, now {now[name]!r}"
        for name in now
        if name not in FREE and before[name] != now[name]
    }


def palette_digest(palette: Tensor) -> str:
    content = palette.detach().cpu().contiguous()
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
