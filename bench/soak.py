"""The interleavings of `tests/test_interleavings.py`, for as long as one likes.

    python -m bench.soak --first 0 --seeds 100 --examples 50

A line for each seed: how many examples it ran, how many steps of a run while others were in progress ("turns"), and
whether all of them had the bits of the run alone. A mismatch is shrunk and shown, and the next seed goes on. The same
seed is the same work, whichever process does it: what was done is a range of seeds. Exit status 1 after a mismatch.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def soak(seed: int, examples: int) -> tuple[int, str | None]:
    """The turns that were taken with one seed, and what went wrong, if anything did."""
    from hypothesis import HealthCheck, settings
    from hypothesis import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test
    from interleavings import STEPS, Machine

    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        derandomize=False,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    before = Machine.turns
    try:
        run_state_machine_as_test(seeded(seed)(Machine), settings=chosen)
    except Exception as error:  # a mismatch, or whatever else a run came to
        notes = getattr(error, "__notes__", ())
        return Machine.turns - before, "\n".join([traceback.format_exc(), *notes])
    return Machine.turns - before, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after another")
    parser.add_argument("--examples", type=int, default=50, help="examples a seed")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    torch.set_num_threads(1)
    total, wrong = 0, []
    for seed in range(options.first, options.first + options.seeds):
        started = time.monotonic()
        turns, error = soak(seed, options.examples)
        total += turns
        outcome = "a mismatch" if error else "no mismatch"
        seconds = time.monotonic() - started
        print(f"seed {seed}: {options.examples} examples, {turns:,} turns, {seconds:.0f} s, {outcome}", flush=True)
        if error:
            wrong.append(seed)
            print(error, flush=True)
    print(f"{total:,} turns, mismatches with {len(wrong)} of {options.seeds} seeds: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
