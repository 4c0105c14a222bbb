"""The path search: which steps to compute, as a shortest path over measured errors of forecasts. numpy alone.

The cost of a run of forecasts is the square of its steps' summed errors, as those of one run point the same way, and
runs add up. So the best plan of any number of computed steps is a shortest path from the first step to the end, whose
state is the last three computed steps. Nothing is forced but the first step.

Source of the structure: DPCache (CVPR 2026), a dynamic programme over measured errors of reuse. That errors are those
of forecasts, taken of one Gram matrix a step, and how they are weighted, is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebcache_fast.errors import InputError
from ebcache_fast.plan.factors import newton

Array = NDArray[np.float64]
MAX_AGE = 24  # steps that a forecast looks back at most


@dataclass(frozen=True)
class Measurement:
    """Errors that forecasts make along uncached trajectories, to first order, and how far they carry.

    gram: (S, W, W); entry [k, a - 1, b - 1] is the mean product of two changes of the guided noise at step k: the one
    that comes of what step k - a computed in the place of its own, and the same of step k - b. 0 before the first step.
    on_eps: (S,), the sampler's coefficient on the noise. growth: (S,), how much larger a displacement of the latents
    that a forecast caused at this step is in the final sample.
    """

    gram: Array
    on_eps: Array
    growth: Array

    @property
    def steps(self) -> int:
        """Number S of steps."""
        return len(self.gram)

    @property
    def window(self) -> int:
        """Number W of steps that a forecast may look back."""
        return int(self.gram.shape[1])

    @property
    def fewest(self) -> int:
        """The fewest steps that a plan can compute: a forecast reaches no further than the window."""
        return -(-self.steps // (self.window + 1))

    def error(self, kept: Sequence[int], step: int) -> float:
        """RMS error of the noise at a step which the polynomial through the kept ones, the last first, forecasts."""
        factors = np.array([float(factor) for factor in newton(kept, step)])
        ages = step - 1 - np.array(kept)
        return float(np.sqrt(max(0.0, factors @ self.gram[step][np.ix_(ages, ages)] @ factors)))

    def weights(self, exponent: float) -> Array:
        """Weight of an error at each step: ``|on_eps| * growth ** exponent``, (S,)."""
        weights: Array = np.abs(self.on_eps) * self.growth**exponent
        return weights


@dataclass(frozen=True)
class Path:
    """A choice of steps to compute, and what it costs."""

    computed: tuple[int, ...]
    cost: float  # predicted: the square root of the sum over runs, in units of the final sample


def best_path(measured: Measurement, computed: int, order: int, exponent: float) -> Path | None:
    """The path of exactly so many computed steps whose forecasts of up to ``order`` cost least.

    None where all look back beyond the window, as those of a higher order do sooner. Raises InputError for a count
    outside [`Measurement.fewest`, S].
    """
    steps, window = measured.steps, measured.window
    if not measured.fewest <= computed <= steps:
        raise InputError(
            f"computed={computed} is outside [{measured.fewest}, {steps}]: a forecast of {steps} steps looks back "
            f"{window} at most"
        )
    costs = _run_costs(measured, order, exponent)
    gap = window + 1  # between computed steps, at most; 0 stands for none
    best = np.full((steps, computed + 1, gap + 1, gap + 1), np.inf)
    came_from = np.zeros((steps, computed + 1, gap + 1, gap + 1), np.int16)
    best[0, 1, 0, 0] = 0.0
    for i in range(steps):
        for ahead in range(1, min(gap, steps - 1 - i) + 1):
            total = best[i, :-1] + costs[i, ahead]  # (computed, g1, g2)
            best[i + ahead, 1:, ahead] = total.min(axis=2)
            came_from[i + ahead, 1:, ahead] = total.argmin(axis=2)
    ends = [(best[i, computed] + costs[i, steps - i], i) for i in range(max(0, steps - gap), steps)]
    totals = np.array([cost.min() for cost, _ in ends])
    if not np.isfinite(totals.min()):
        return None
    cost, i = ends[int(totals.argmin())]
    g1, g2 = divmod(int(cost.argmin()), gap + 1)
    path = [i]
    for count in range(computed, 1, -1):
        before = int(came_from[i, count, g1, g2])
        i, g1, g2 = i - g1, g2, before
        path.append(i)
    return Path(tuple(reversed(path)), float(np.sqrt(totals.min())))


def _run_costs(measured: Measurement, order: int, exponent: float) -> Array:
    """Cost of the forecasts after each computed step, (S, gap + 1, gap + 1, gap + 1).

    By how far ahead the next computed one is, and how far apart the last three were: 0 where there were fewer.
    """
    steps, window = measured.steps, measured.window
    gap, weights = window + 1, measured.weights(exponent)
    costs = np.full((steps, gap + 1, gap + 1, gap + 1), np.inf)
    costs[:, 1] = 0.0
    gaps = [(g1, g2) for g1 in range(gap + 1) for g2 in range(gap + 1) if g1 or not g2]
    for ahead in range(1, min(window, steps - 1) + 1):
        for g1, g2 in gaps:
            kept = _kept(g1, g2, order)  # ages, from the last computed step
            if kept[-1] + ahead > window:
                continue
            factors = np.array([float(factor) for factor in newton([-age for age in kept], ahead)])
            ages = ahead - 1 + np.array(kept)
            grams = measured.gram[ahead:, ages[:, None], ages]  # of the steps that are so far ahead
            errors = np.sqrt(np.maximum(0.0, np.einsum("a,sab,b->s", factors, grams, factors)))
            so_far = 0.0 if ahead == 1 else costs[: steps - ahead, ahead, g1, g2]
            costs[: steps - ahead, ahead + 1, g1, g2] = so_far + weights[ahead:] * errors
    return costs**2


def _kept(g1: int, g2: int, order: int) -> list[int]:
    """The ages of the values that a forecast takes, from the last computed step, the first 0."""
    ages = [0]
    if g1:
        ages.append(g1)
        if g2:
            ages.append(g1 + g2)
    return ages[: order + 1]
