"""Runs of equal labels or prompts never get each other's caches, whatever takes turns."""

import pytest
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from requests_alike import KINDS, machine_of


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_in_every_order(kind: str) -> None:
    _run(kind, examples=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_in_every_order(kind: str) -> None:
    assert _run(kind, examples=80) > 500


def _run(kind: str, examples: int) -> int:
    machine = machine_of(KINDS[kind])
    chosen = settings(max_examples=examples, stateful_step_count=15, derandomize=False, database=None)
    run_state_machine_as_test(seed(0)(machine), settings=chosen)
    return machine.turns
