"""A table of a given cost: what is reachable, how loose its thresholds have to be, which votes to give back."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real

import numpy as np

from ebcache_fast.calibration.algorithm1 import Algorithm1
from ebcache_fast.calibration.tally import CANDIDATES, Tally, may_cache
from ebcache_fast.errors import InputError
from ebcache_fast.plan import ModelShape, Plan, StepType

ROUNDS = 12  # thresholds tried at most
TOLERANCE = 0.02  # of the target: what ends further away is said
STRIDE = 4.0  # by which thresholds grow until enough is cached

Costs = Mapping[StepType, int]  # MACs of a step of each type


def step_costs(shape: ModelShape) -> Costs:
    """Cost of a step of each candidate on a model, in MACs of one guidance branch."""
    plan = Plan.from_types(CANDIDATES, range(len(CANDIDATES))[::-1], shape.sites)
    return dict(zip(CANDIDATES, plan.step_macs(shape), strict=True))


def speedup_of(types: Sequence[StepType], costs: Costs) -> float:
    """Speed-up over no caching that the MAC count allows a table of these steps."""
    return len(types) * costs[StepType.NO_CACHE] / sum(costs[step_type] for step_type in types)


def fastest(steps: int, algorithm: Algorithm1) -> list[StepType]:
    """The cheapest table that any multiple of the algorithm's thresholds can make."""
    types: list[StepType] = []
    run = 0
    for step in range(steps):
        is_cached = may_cache(step, steps) and run != algorithm.max_run and algorithm.threshold(step, steps) > 0
        run = run + 1 if is_cached else 0
        types.append(StepType.ATTN_MLP if is_cached else StepType.NO_CACHE)
    return types


def check_target(target: float, steps: int, algorithm: Algorithm1, costs: Costs) -> None:
    """Raise InputError unless a table of so many steps can have this speed-up."""
    if not isinstance(target, Real):
        raise InputError(f"target_speedup={target!r} is no number; pass one of at least 1, or leave it out")
    reach = speedup_of(fastest(steps, algorithm), costs)
    if not 1 <= target <= reach * (1 + TOLERANCE):
        limit = "" if algorithm.max_run is None else f" with max_run={algorithm.max_run}"
        raise InputError(
            f"target_speedup={target:g} is outside [1, {reach:.2f}], all that the MACs of {steps} steps{limit} allow: "
            "the first two and the last are computed in full; ask for less, or for more steps or a larger max_run"
        )


def loosened(table_at: Callable[[float, int], Sequence[StepType]], target: float, reach: float, costs: Costs) -> float:
    """The first multiple of the thresholds, 1, 4, 16 and so on, that caches a little more than the target.

    ``table_at(factor, rounds_left)`` counts votes. How much too much it caches matters little: what is given back is
    the same. The last one tried, if none does.
    """
    factor = 1.0
    goal = min(target * (1 + TOLERANCE), reach) * (1 - 1e-9)  # more, as all samples may vote for less than a few
    for left in reversed(range(ROUNDS)):
        if speedup_of(table_at(factor, left), costs) >= goal or not left:
            break
        factor *= STRIDE
    return factor


def give_back(
    types: Sequence[StepType], tally: Tally, algorithm: Algorithm1, target: float, costs: Costs
) -> list[StepType]:
    """The table nearest to the target of those that cache less and less: what has fewest votes is given back first.

    One vote at a time becomes the next safer type; of equals the one whose mean error is nearest to its threshold.
    """
    current, best = list(types), list(types)
    claims = tally.votes[:, ::-1].cumsum(axis=1)[:, ::-1]  # (T, 3) votes for a candidate or a cheaper one
    allowed = np.array([[algorithm.threshold(step, len(types))] for step in range(len(types))])
    tightness = tally.errors / np.where(allowed > 0, allowed, 1)

    def strength(step: int) -> tuple[int, float]:
        column = CANDIDATES.index(current[step])
        return int(claims[step, column]), -float(tightness[step, column])

    while speedup_of(current, costs) > target:
        weakest = min((step for step, kind in enumerate(current) if kind is not StepType.NO_CACHE), key=strength)
        current[weakest] = CANDIDATES[CANDIDATES.index(current[weakest]) - 1]
        if _distance(current, target, costs) < _distance(best, target, costs):
            best = list(current)
    return best


def _distance(types: Sequence[StepType], target: float, costs: Costs) -> float:
    return abs(speedup_of(types, costs) - target)
