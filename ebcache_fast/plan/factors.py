"""Factors of terms that depend on when their slots were written: forecasts as sums over kept values.

A recurrence over values that were computed at known steps is linear in them. Run once on unit vectors, here, it gives
the factor of each value, so that a step only adds up, and knows nothing of derivatives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from math import factorial, prod
from types import MappingProxyType
from typing import NamedTuple

from ebcache_fast.plan.program import Program, Slot, Term


def taylor(steps: Sequence[int], now: int) -> list[Fraction]:
    """The factor of each value, of steps in falling order, in its Taylor forecast at step ``now``.

    The m-th difference divides by the distance of the last two computed steps, and counts with distance^m / m!.
    Source: TaylorSeer, Liu et al., arXiv 2503.06923, eq. 4 to 6.
    """
    return _of_differences(steps, [Fraction((now - steps[0]) ** n, factorial(n)) for n in range(len(steps))])


def newton(steps: Sequence[int], now: int) -> list[Fraction]:
    """The factor of each value in the polynomial through all of them, at step ``now``.

    Equal to `taylor` for two values or fewer; of more it is the one that is exact for a polynomial of their order.
    Source: Newton's and Lagrange's interpolation.
    """
    return [prod((Fraction(now - b, a - b) for b in steps if b != a), start=Fraction(1)) for a in steps]


def hermite(steps: Sequence[int], now: int) -> list[Fraction]:
    """`taylor` with the contracted Hermite polynomial of the distance in the place of each power of it.

    Source: HiCache, Feng et al., arXiv 2508.16984: sigma^m * H_m(sigma * distance) with the physicists' polynomials
    and its recommended sigma of 1/2, so that a first difference counts with distance / 2.
    """
    return _of_differences(steps, [_contracted(order, now - steps[0]) for order in range(len(steps))])


def adams_bashforth(steps: Sequence[int], now: int) -> list[Fraction]:
    """The factor of each value where its last two slopes, 3/2 and -1/2 of them, carry on from the last value.

    Of two values or fewer it is `taylor`; values before the third are not looked at.
    Source: the explicit two-step rule of Adams and Bashforth, over computed steps.
    """
    if len(steps) < 3:
        return taylor(steps, now)
    last, before, first = steps[:3]
    ahead = Fraction(now - last)
    slope, slope_before = ahead * Fraction(3, 2) / (last - before), -ahead / 2 / (before - first)
    return [1 + slope, slope_before - slope, -slope_before, *[Fraction(0)] * (len(steps) - 3)]


def _of_differences(steps: Sequence[int], shares: Sequence[Fraction]) -> list[Fraction]:
    """The factors of values of which the m-th divided difference in TaylorSeer's sense counts ``shares[m]`` times."""
    differences = [[Fraction(i == j) for j in range(len(steps))] for i in range(len(steps))]
    total = [Fraction(0)] * len(steps)
    for share in shares:
        total = [factor + share * value for factor, value in zip(total, differences[0], strict=True)]
        differences = [
            [(a - b) / (steps[i] - steps[i + 1]) for a, b in zip(differences[i], differences[i + 1], strict=True)]
            for i in range(len(differences) - 1)
        ]
    return total


def _contracted(order: int, distance: int) -> Fraction:
    """HiCache's polynomial of an order, over its factorial: of order 0, 1, 2: 1, distance / 2, (distance^2 - 2) / 8."""
    sigma = Fraction(1, 2)
    values = [Fraction(1), 2 * sigma * distance]
    for n in range(1, order):
        values.append(2 * sigma * distance * values[n] - 2 * n * values[n - 1])
    return sigma**order * values[order] / factorial(order)


LAWS: Mapping[str, Callable[[Sequence[int], int], list[Fraction]]] = MappingProxyType(
    {"taylor": taylor, "newton": newton, "hermite": hermite, "adams-bashforth": adams_bashforth}
)


class _Group(NamedTuple):
    """Terms that are forecast together: the ages ``first`` to ``last`` of one slot, under one law."""

    gate: int | None
    law: str
    meaning: str
    first: int
    last: int


def factors_of(programs: Iterable[Program], extra: Sequence[Term]) -> tuple[tuple[float, ...], ...]:
    """The factor of each of these terms at each step of a run; 1 without a law, 0 where a step does not add it."""
    written: dict[Slot, int] = {}
    found: list[tuple[float, ...]] = []
    for now, program in enumerate(programs):
        terms = [term for launch in program for term in launch.terms]
        of_step = {term: Fraction(1) for term in terms if not term.law}
        lawful = sorted((term for term in terms if term.law), key=_group)
        for group, alike in groupby(lawful, _group):
            recent = {written[term.slot]: term for term in alike}  # of those written at once, one counts
            steps = sorted(recent, reverse=True)
            of_step |= zip(map(recent.__getitem__, steps), LAWS[group.law](steps, now), strict=True)
        found.append(tuple(float(of_step.get(term, 0)) for term in extra))
        written |= dict.fromkeys(program.writes, now)
    return tuple(found)


def _group(term: Term) -> _Group:
    return _Group(term.gate, term.law, term.slot.meaning, term.slot.first, term.slot.last)
