"""Interleaved trajectories equal isolated ones bitwise; `python -m bench.soak` runs more of the same."""

from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from interleavings import STEPS, Machine

PHASES = [Phase.explicit, Phase.generate, Phase.shrink]


def test_whatever_takes_turns_has_the_bits_of_each_run_alone() -> None:
    before = Machine.turns
    run_state_machine_as_test(Machine, settings=settings(max_examples=30, stateful_step_count=STEPS, phases=PHASES))
    assert Machine.turns - before >= 2000
