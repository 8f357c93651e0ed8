"""Whether the hybrid keeps what the others can do, by margins decided beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ACCURACY, BITS, AUROC = "accuracy", "bits_per_pixel", "auroc"
MARGINS = {ACCURACY: 0.01, BITS: 0.03, AUROC: 0.02}
SCORE = "likelihood"  # the score whose AUROC decides
ROUNDING = 1e-9  # 0.45 - 0.44 is above 0.01

Measures = Mapping[str, Mapping[str, Any]]  # one seed's, by variant


def judge(seeds: Sequence[Measures], sets: list[str]) -> list[dict[str, Any]]:
    """Every claim that has been measured on each of the seeds.

    The hybrid keeps a measure if it falls short of the other run by no more than the margin, or
    than two standard errors of the difference over the seeds.
    """
    claims: list[tuple[str, str, str | None]]
    claims = [(ACCURACY, "contrastive", None), (ACCURACY, "simclr", None)]
    claims += [(BITS, "generative", None)]
    claims += [(AUROC, "generative", name) for name in sets]
    verdicts = []
    for measure, other, name in claims:
        pairs = [
            (read(seed["hybrid"], measure, name), read(seed[other], measure, name))
            for seed in seeds
            if "hybrid" in seed and other in seed
        ]
        found = [
            (ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None
        ]
        if not found or len(found) < len(seeds):
            continue
        sign = -1 if measure == BITS else 1  # fewer bits are better
        short = np.array(found, dtype=float) @ (-sign, sign)
        error = float(short.std(ddof=1) / np.sqrt(len(short))) if len(short) > 1 else 0.0
        allowed = max(MARGINS[measure], 2 * error)
        verdicts.append(
            {
                "measure": measure,
                "against": other,
                "set": name,
                "short": float(short.mean()),
                "standard_error": error,
                "allowed": allowed,
                "keeps": bool(short.mean() <= allowed + ROUNDING),
                "seeds": len(short),
            }
        )
    return verdicts


def read(measures: Mapping[str, Any], measure: str, name: str | None = None) -> float | None:
    """One number of a network; an AUROC is that of SCORE on the set of that name."""
    if measure != AUROC:
        value: float | None = measures.get(measure)
        return value
    scores = measures.get(AUROC, {}).get(name, {})
    return scores.get(SCORE)
