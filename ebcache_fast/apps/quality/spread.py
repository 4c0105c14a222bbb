"""Spread of a figure over seeds, and the error of a difference between two methods."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ebcache_fast.errors import InputError


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (divisor n - 1) of n values, one a seed."""

    mean: float
    deviation: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of n paired differences, and the standard error of that mean."""

    mean: float
    standard_error: float
    n: int


def mean_and_spread(values: Sequence[float]) -> Spread:
    """The spread of one figure over seeds; InputError for fewer than 2 values or a non-finite one."""
    if len(values) < 2:
        raise InputError(f"{len(values)} values were given; a spread needs at least 2: use more seeds")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise InputError(f"value {index} is {value}; all must be finite: look for a failed run")
    mean = statistics.fmean(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return Spread(mean, deviation, len(values))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """a - b over seeds, where a[i] and b[i] share their noise, so that what the seeds do to both cancels.

    Raises InputError for unequal lengths, fewer than 2 pairs, or a non-finite value.
    """
    if len(a) != len(b):
        raise InputError(f"a has {len(a)} values and b {len(b)}; they must pair up: run both on the same seeds")
    spread = mean_and_spread([x - y for x, y in zip(a, b, strict=True)])
    return PairedDifference(spread.mean, spread.deviation / math.sqrt(spread.n), spread.n)


def jackknife_error(left_out: Sequence[float]) -> float:
    """Standard error of a statistic, given its values with one of g groups of samples left out at a time.

    Unlike a spread over seeds it is that of the statistic over all samples: a Frechet distance over fewer is biased.
    Source: Efron and Stein, "The jackknife estimate of variance" (1981), delete-one-group form. Raises InputError as
    `mean_and_spread` does.
    """
    spread = mean_and_spread(left_out)
    return spread.deviation * (spread.n - 1) / math.sqrt(spread.n)
