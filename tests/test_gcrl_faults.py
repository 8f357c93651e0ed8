"""A share of the trials of faults.py: what breaks a run is an error, or changes nothing."""

from __future__ import annotations

import torch
from faults import run_trials


def test_faults() -> None:
    threads = torch.get_num_threads()
    try:
        assert run_trials(24, seed=1, names=("failing_system", "flipped_bit", "cut_file")) == []
        assert run_trials(4, seed=2, names=("signalled", "different_ranks")) == []
    finally:
        torch.set_num_threads(threads)
