"""The emulator of tests/cuda_emulator: faults in a kernel show, and without them it runs."""

from __future__ import annotations

import subprocess

import pytest
from limits import HANG

SHOWS_IN_RESULTS = ("give", "give_in_warp", "copy", "copy_over")
NOTICED = {
    "shuffle_in_a_branch": "the threads wait for one another, some at __shfl_xor_sync",
    "meet_apart": "threads meet at ",
    "load_outside": "outside shared memory",
    "load_misaligned": "misaligned shared memory",
    "copy_misaligned": "cp.async: misaligned source",
    "no_blocks": "expected 1 to 2147483647 blocks, got 0",
    "many_blocks": "expected 1 to 2147483647 blocks, got 2147483648",
    "blocks_in_two_dimensions": "expected 1 to 1 in the other dimensions, got 2",
    "no_threads": "expected 1 to 1024 threads, got 0",
    "many_threads": "expected 1 to 1024 threads, got 1025",
    "much_shared_memory": "expected 0 to 232448 bytes of shared memory, got 232449",
}


@pytest.mark.parametrize("name", [*SHOWS_IN_RESULTS, *NOTICED])
def test_a_fault_shows(emulator, name) -> None:
    program = emulator.program("faults.cpp", *emulator.torch_includes())
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert NOTICED.get(name, "wrong") in done.stdout
