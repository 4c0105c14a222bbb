"""Votes of samples for every step of a trajectory, counted, and the steps that win."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ebcache_fast.plan import StepType

CANDIDATES = (StepType.NO_CACHE, StepType.ATTENTION, StepType.ATTN_MLP)  # from the safest to the cheapest
KEEP_FIRST, KEEP_LAST = 2, 1  # executed steps that are never cached


def may_cache(step: int, steps: int) -> bool:
    """True if executed step ``step`` of ``steps`` may be cached: the first two and the last never are."""
    return KEEP_FIRST <= step < steps - KEEP_LAST


@dataclass
class Tally:
    """Votes and errors summed over samples; columns as in `CANDIDATES`."""

    votes: NDArray[np.int64]  # (T, 3)
    errors: NDArray[np.float64]  # (T, 3) sums; 0 where a candidate was not tried
    samples: int

    @classmethod
    def empty(cls, steps: int) -> Self:
        """A tally of no samples."""
        return cls(np.zeros((steps, 3), np.int64), np.zeros((steps, 3)), 0)

    def add(self, other: "Tally") -> None:
        """Count another batch's votes and errors in."""
        self.votes += other.votes
        self.errors += other.errors
        self.samples += other.samples

    def mean_errors(self, candidate: StepType) -> tuple[float | None, ...]:
        """The candidate's mean error at every step, None where it was not tried."""
        res = (self.errors[:, CANDIDATES.index(candidate)] / self.samples).tolist()
        return tuple(mean if may_cache(i, len(res)) else None for i, mean in enumerate(res))

    def winners(self, max_run: int | None) -> list[StepType]:
        """The majority's type of every step, ties to the safer; never over ``max_run`` cached in a row.

        Each sample kept the limit on its own, but their majority may not: a step too many becomes NO_CACHE.
        """
        winners: list[StepType] = []
        run = 0
        for column in self.votes.argmax(axis=1):  # argmax takes the first, hence the safest, of equals
            winner = CANDIDATES[int(column)]
            run = 0 if winner is StepType.NO_CACHE or run == max_run else run + 1
            winners.append(winner if run else StepType.NO_CACHE)
        return winners
