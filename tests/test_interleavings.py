"""Interleaved trajectories equal isolated ones bitwise; `python -m bench.soak` runs more of the same."""

from itertools import count

import pytest
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test
from interleavings import STEPS, Machine

TURNS = 2000


@pytest.mark.slow
def test_whatever_takes_turns_has_the_bits_of_each_run_alone() -> None:
    chosen = settings(max_examples=10, stateful_step_count=STEPS, derandomize=False, database=None)
    before = Machine.turns
    for number in count():
        run_state_machine_as_test(seed(number)(Machine), settings=chosen)
        if Machine.turns - before >= TURNS:
            break
