"""Factors of terms that depend on when their slots were written: forecasts as sums over kept values.

A recurrence over values that were computed at known steps is linear in them. Run once on unit vectors, here, it gives
the factor of each value, so that a step only adds up, and knows nothing of derivatives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from math import factorial
from typing import NamedTuple

from ebcache_fast.plan.program import Program, Slot, Term


def taylor(steps: Sequence[int], now: int) -> list[Fraction]:
    """The factor of each value, of steps in falling order, in its Taylor forecast at step ``now``.

    The m-th difference divides by the distance of the last two computed steps, and counts with distance^m / m!.
    Source: TaylorSeer, Liu et al., arXiv 2503.06923, eq. 4 to 6.
    """
    differences = [[Fraction(i == j) for j in range(len(steps))] for i in range(len(steps))]
    total = [Fraction(0)] * len(steps)
    for order in range(len(steps)):
        share = Fraction((now - steps[0]) ** order, factorial(order))
        total = [factor + share * value for factor, value in zip(total, differences[0], strict=True)]
        differences = [
            [(a - b) / (steps[i] - steps[i + 1]) for a, b in zip(differences[i], differences[i + 1], strict=True)]
            for i in range(len(differences) - 1)
        ]
    return total


LAWS: Mapping[str, Callable[[Sequence[int], int], list[Fraction]]] = {"taylor": taylor}


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
            recent = sorted(alike, key=lambda term: -written[term.slot])
            of_step |= zip(recent, LAWS[group.law]([written[term.slot] for term in recent], now), strict=True)
        found.append(tuple(float(of_step.get(term, 0)) for term in extra))
        written |= dict.fromkeys(program.writes, now)
    return tuple(found)


def _group(term: Term) -> _Group:
    return _Group(term.gate, term.law, term.slot.meaning, term.slot.first, term.slot.last)
