"""Aims of a path search: which number of computed steps comes nearest to what is asked for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from ebcache_fast.calibration.path_search import MAX_AGE
from ebcache_fast.errors import InputError
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.plan.timesteps import some_of
from ebcache_fast.policies.forecast import forecast

USUAL = 2.0  # speed-up
NEAR = 0.01  # of the furthest that can be reached, by which an aim may lie beyond it
SHORT, SHORT_AGE = 100, 12  # runs of more steps look back less far, or the search would fill the memory
TIMED = ("KEEP", "FORECAST")  # the steps of a path


@dataclass(frozen=True)
class Aim:
    """Number of steps to compute, and what a table says of how it came about."""

    computed: int
    options: Mapping[str, float]


def at_speedup(target: float | None, shape: ModelShape, timesteps: tuple[float, ...]) -> Aim:
    """The number of computed steps whose speed-up by MACs is nearest to ``target``; None: 2, or as much as there is.

    Raises InputError, naming what is reachable, for one that no path of such a run comes near.
    """
    speedups = reachable(shape, timesteps)
    furthest = max(speedups.values())
    target = min(USUAL, furthest) if target is None else _number("target_speedup", target)
    if not 1 <= target <= furthest * (1 + NEAR):
        shown = some_of([f"{speedup:.2f} ({count} computed)" for count, speedup in speedups.items()][::-1])
        raise InputError(
            f"target_speedup={target:g} is outside [1, {furthest:.2f}], all that {len(timesteps)} steps "
            f"allow by MACs; ask for less, or for more steps; reachable are {shown}"
        )
    computed = min(speedups, key=lambda count: abs(speedups[count] - target))
    return Aim(computed, {"target_speedup": target})


def at_milliseconds(target: float, step_ms: Mapping[str, float] | None, timesteps: tuple[float, ...]) -> Aim:
    """The number of computed steps with which a run takes nearest to ``target`` milliseconds.

    step_ms: how long a step takes that computes everything, "KEEP", and one that forecasts, "FORECAST", as a profile of
    any path's table says. Raises InputError where one of them is missing, and for a target out of reach.
    """
    target, times = _number("target_ms", target), dict(step_ms or {})
    keep, forecasting = (times.get(name, 0.0) for name in TIMED)
    if not all(isinstance(ms, Real) and 0 < ms < math.inf for ms in (keep, forecasting)):
        raise InputError(
            f"step_ms={times} has to say how many milliseconds a step of {' and of '.join(TIMED)} takes, each above 0; "
            "profile a table of the path search, and pass what it says of them"
        )
    steps, fewest = len(timesteps), fewest_of(len(timesteps))
    runs = {count: count * keep + (steps - count) * forecasting for count in range(steps, fewest - 1, -1)}
    if not min(runs.values()) * (1 - NEAR) <= target <= max(runs.values()) * (1 + NEAR):
        raise InputError(
            f"target_ms={target:g} is outside [{min(runs.values()):.3g}, {max(runs.values()):.3g}], what {steps} steps "
            f"of {keep:g} and {forecasting:g} ms can take with {fewest} computed or more; ask for other steps"
        )
    computed = min(runs, key=lambda count: abs(runs[count] - target))
    return Aim(computed, {"target_ms": target, "ms": round(runs[computed], 4)})


def reachable(shape: ModelShape, timesteps: tuple[float, ...]) -> dict[int, float]:
    """The speed-up over no caching that the MAC count allows, by each number of computed steps of such a run."""
    steps = len(timesteps)
    uncached = Plan.uncached(timesteps, shape.sites).macs(shape)
    most, least = (forecast(timesteps, shape, range(count)).macs(shape) for count in (steps, 1))
    a_step = (most - least) / max(1, steps - 1)
    counts = range(steps, fewest_of(steps) - 1, -1)
    return {count: uncached / (least + (count - 1) * a_step) for count in counts}


def window_of(steps: int) -> int:
    """Number of steps that forecasts of a run look back at most; one step has none."""
    return max(1, min(steps - 1, MAX_AGE if steps <= SHORT else SHORT_AGE))


def fewest_of(steps: int) -> int:
    """The fewest steps that a path can compute: a forecast reaches no further than the window."""
    return -(-steps // (window_of(steps) + 1))


def _number(name: str, value: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name}={value!r} is no number; pass one, or leave it out")
    return float(value)
