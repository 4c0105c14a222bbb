"""Whose a call is, and what answers it: a table of situations, and what holds in all small ones."""

from collections.abc import Iterator
from itertools import combinations, product

import pytest

from ebcache_fast.dropin.decision import (
    AGAIN,
    ALIKE,
    FRESH,
    GAVE_WAY,
    LEFT_OUT,
    UNPLANNED,
    Answer,
    Stand,
    Standing,
    Verdict,
    Whose,
    decide,
)

PLAIN, DOUBTFUL, RISING = Stand(), Stand(is_doubtful=True), Stand(rises=True)
OTHER = Stand(changed="weights changed")
NEXT, BEGINS, ENDS, ONLY, EITHER = Whose.NEXT, Whose.BEGINS, Whose.ENDS, Whose.ONLY, Whose.ALIKE


def standing(*steps: int, lost: tuple[int, ...] = (), ends: tuple[int, ...] = (), **runs: Stand) -> Standing:
    """Runs that expect these steps, or ``at3=`` a step 3, some lost there, and some that have ended."""
    at = dict.fromkeys(steps, PLAIN) | {int(name[2:]): stand for name, stand in runs.items()}
    return Standing(at, {step: lost.count(step) for step in lost}, set(ends))


NONE = standing()
TABLE: dict[str, tuple[int | None, Standing, Standing, Whose, int | None, str | None]] = {
    "a first call": (0, NONE, NONE, BEGINS, None, None),
    "a run begins beside others": (0, standing(2, 4), NONE, BEGINS, None, None),
    "where an unplanned call was": (0, standing(0, 2), NONE, BEGINS, 0, None),
    "the first step of one that rises": (0, standing(at2=RISING), NONE, ENDS, 2, None),
    "of two, one of which rises": (0, standing(1, at2=RISING), NONE, BEGINS, None, None),
    "of one that rises, and one that may come back": (0, standing(at2=RISING, ends=(1,)), NONE, BEGINS, None, None),
    "the next step": (3, standing(3), NONE, NEXT, 3, None),
    "the next step of one of several": (3, standing(1, 3, 5), NONE, NEXT, 3, None),
    "with others lost elsewhere": (3, standing(3, lost=(1, 5)), NONE, NEXT, 3, None),
    "just made by another": (3, standing(3, 4), NONE, EITHER, 3, ALIKE),
    "expected by another without caches": (3, standing(3, lost=(3,)), NONE, EITHER, 3, ALIKE),
    "just made by another without caches": (3, standing(3, lost=(4,)), NONE, EITHER, 3, ALIKE),
    "the last step, of one that may come back to it": (3, standing(3, ends=(4,)), NONE, EITHER, 3, ALIKE),
    "expected by a forgotten one": (3, standing(3), standing(lost=(3,)), EITHER, 3, ALIKE),
    "just made by a forgotten one": (3, standing(3), standing(lost=(4,)), EITHER, 3, ALIKE),
    "the last step of a forgotten one": (3, standing(3), standing(ends=(4,)), EITHER, 3, ALIKE),
    "forgotten ones elsewhere": (3, standing(3), standing(lost=(1,), ends=(9,)), NEXT, 3, None),
    "of two, neither at it": (3, standing(1, 5), NONE, EITHER, 1, ALIKE),
    "of two, one has just made it": (3, standing(1, 4), NONE, EITHER, 4, ALIKE),
    "of two without caches": (3, standing(lost=(1, 1)), NONE, EITHER, None, ALIKE),
    "not planned, of two": (None, standing(2, 5), NONE, EITHER, 2, UNPLANNED),
    "not planned, of one": (None, standing(2), NONE, ONLY, 2, UNPLANNED),
    "not planned, of none": (None, NONE, NONE, ONLY, None, UNPLANNED),
    "a step again": (3, standing(4), NONE, ONLY, 4, AGAIN),
    "an earlier step": (1, standing(4), NONE, ONLY, 4, AGAIN),
    "steps left out": (5, standing(4), NONE, ONLY, 4, LEFT_OUT),
    "of nobody": (3, NONE, NONE, ONLY, None, FRESH),
    "of one without caches": (3, standing(lost=(3,)), NONE, ONLY, None, FRESH),
    "of a forgotten one": (3, NONE, standing(lost=(2,)), ONLY, None, FRESH),
    "after nothing but an unplanned call": (3, standing(0), NONE, ONLY, 0, FRESH),
    "of one whose tensors are gone": (3, standing(at3=DOUBTFUL), NONE, ONLY, 3, FRESH),
    "of one that gave way": (3, NONE._replace(gave_way=True), NONE, ONLY, None, GAVE_WAY),
    "weights changed": (3, standing(at3=OTHER), NONE, NEXT, 3, OTHER.changed),
    "weights changed, and a step left out": (4, standing(at3=OTHER), NONE, ONLY, 3, OTHER.changed),
    "weights changed, and not planned": (None, standing(at3=OTHER), NONE, ONLY, 3, OTHER.changed),
    "weights changed before it begins": (0, standing(at0=OTHER), NONE, BEGINS, 0, None),
    "weights changed, of two": (3, standing(1, at3=OTHER, at4=PLAIN), NONE, EITHER, 3, ALIKE),
}


@pytest.mark.parametrize(("step", "runs", "forgotten", "whose", "run", "why"), TABLE.values(), ids=TABLE)
def test_the_table(
    step: int | None, runs: Standing, forgotten: Standing, whose: Whose, run: int | None, why: str | None
) -> None:
    verdict = decide(step, runs, forgotten)
    outdated = run is not None and runs.at[run].changed is not None
    assert verdict == Verdict(whose, run, outdated, Answer.FOLLOW if why is None else Answer.REFRESH, why)


STANDS = (PLAIN, DOUBTFUL, RISING, OTHER)
STEPS = (None, *range(4))


def worlds() -> Iterator[Standing]:
    """All with up to two runs with caches, up to two without and one that has ended, of four steps."""
    for count, has_ended in product(range(3), (False, True)):
        for places in combinations(range(4), count):
            for stands in product(STANDS, repeat=count):
                for lost in ({}, {1: 1}, {2: 1}, {1: 1, 3: 1}):
                    at = dict(zip(places, stands, strict=True))
                    yield Standing(at, lost, {4} if has_ended else set(), has_ended)


WORLDS = list(worlds())
FORGOTTEN = (NONE, standing(lost=(2,)), standing(ends=(4,)))


def could_be_of(step: int, *worlds: Standing) -> int:
    """How many runs there are that expect a step or have just made it."""
    with_caches = [expected for world in worlds for expected in world.at]
    without = [expected for world in worlds for expected, n in world.lost.items() for _ in range(n)]
    ended = {end for world in worlds for end in world.ends}
    return sum(expected - step in (0, 1) for expected in (*with_caches, *without, *ended))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_run_is_taken_for_certain_only_where_no_other_could_make_the_call(
    step: int | None, forgotten: Standing
) -> None:
    for runs in WORLDS:
        verdict = decide(step, runs, forgotten)
        there = len(runs.at) + sum(runs.lost.values()) + sum(forgotten.lost.values())
        there += step is not None and step + 1 in {*runs.ends, *forgotten.ends}
        is_next = bool(
            step and step in runs.at and not runs.at[step].is_doubtful and could_be_of(step, runs, forgotten) == 1
        )
        assert (verdict.whose is Whose.NEXT) == is_next
        assert (verdict.whose is Whose.ALIKE) == (step != 0 and not is_next and there > 1)
        assert (verdict.whose in (Whose.BEGINS, Whose.ENDS)) == (step == 0)
        assert verdict.is_only == (verdict.whose in (Whose.ONLY, Whose.ENDS))
        if verdict.is_only:
            assert there <= 1
            assert verdict.run is None or [*runs.at] == [verdict.run]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("is_full", "strict", "in_order"), [*product([False, True], repeat=3)])
def test_caches_are_read_only_where_they_are_the_calls_and_hold(
    step: int | None, is_full: bool, strict: bool, in_order: bool
) -> None:
    for runs in WORLDS:
        verdict = decide(step, runs, is_full=is_full, strict=strict, in_order=in_order)
        assert verdict.run is None or verdict.run in runs.at
        stand = Stand() if verdict.run is None else runs.at[verdict.run]
        assert verdict.is_outdated == (stand.changed is not None)
        assert (verdict.answer is Answer.FOLLOW) == (verdict.why is None)
        if verdict.answer is Answer.FOLLOW and step != 0 and not is_full:
            assert verdict.whose is Whose.NEXT
            assert stand.changed is None
        if step is None:
            assert verdict.why in (UNPLANNED, stand.changed)
        may_be_refreshed = not in_order or (verdict.whose is Whose.ONLY and stand.is_doubtful)
        departs = Answer.DECLINE if not may_be_refreshed else Answer.REFUSE if strict else Answer.REFRESH
        assert verdict.answer in (Answer.FOLLOW, departs)


@pytest.mark.parametrize("step", STEPS)
def test_what_answers_does_not_change_whose_it_is(step: int | None) -> None:
    for runs in WORLDS:
        verdicts = {
            decide(step, runs, strict=strict, in_order=in_order)._replace(answer=Answer.FOLLOW)
            for strict, in_order in product([False, True], repeat=2)
        }
        assert len(verdicts) == 1
        full = decide(step, runs, is_full=True)
        assert full._replace(answer=Answer.FOLLOW, why=None) == next(iter(verdicts))._replace(why=None)
