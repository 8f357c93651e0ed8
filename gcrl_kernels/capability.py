"""Which NVIDIA GPUs run what was compiled for which, by their compute capability."""

from __future__ import annotations

import re
from functools import cache

import torch

Capability = tuple[int, int]  # major, minor


def runs_on(card: Capability, architectures: str) -> bool:
    """Whether code for `architectures`, written as setup.py takes them, runs on a card.

    Code for X.Y runs on X.Z with Z >= Y, with +PTX on everything newer; for X.Ya on X.Y alone, and
    for X.Yf on X.Z with Z >= Y.
    """
    return any(_one_runs_on(card, each) for each in architectures.split())


def _one_runs_on(card: Capability, architecture: str) -> bool:
    parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    assert parts is not None, architecture
    compiled = int(parts[1]), int(parts[2])
    if parts[3] == "a":
        return card == compiled
    if parts[4] and not parts[3]:
        return card >= compiled
    return card[0] == compiled[0] and card[1] >= compiled[1]


@cache
def of_card(device: torch.device) -> Capability | None:
    """Of a GPU; None where there is none to ask."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def as_text(card: Capability) -> str:
    return f"{card[0]}.{card[1]}"
