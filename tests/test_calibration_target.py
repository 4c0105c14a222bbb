"""A target speed-up: what is reachable is computed, the rest refused, and what misses it is said."""

import logging
from collections.abc import Callable
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_dit

from ebcache_fast.calibration import voting as calibration_voting
from ebcache_fast.calibration.algorithm1 import Algorithm1
from ebcache_fast.calibration.search import calibrate
from ebcache_fast.calibration.tally import CANDIDATES, Tally
from ebcache_fast.calibration.target import ROUNDS, fastest, give_back, speedup_of, step_costs
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT, DiTDenoiser
from ebcache_fast.plan import StepType
from ebcache_fast.plan.table import CacheTable

NO, ATTENTION, ATTN_MLP = CANDIDATES
COSTS = {NO: 100, ATTENTION: 65, ATTN_MLP: 1}
STEPS = 8
FEW = {"samples": 3, "steps": STEPS, "batch_size": 4, "algorithm": Algorithm1(a=0.002, k=0.02)}


@cache
def model() -> DiT:
    return tiny_dit(6)


def speedup(table: CacheTable) -> float:
    shape = DiTDenoiser(model()).shape
    return table.plan(shape).mac_limit(shape)


# ------------------------------------------------------------------------------------------------------- reach


def runs_of_cached(types: tuple[StepType, ...]) -> list[int]:
    return [len(list(run)) for cached, run in groupby(types, lambda kind: kind is not NO) if cached]


@pytest.mark.parametrize("max_run", [1, 2, 3, None])
@pytest.mark.parametrize("steps", range(1, 9))
def test_the_reach_is_that_of_all_tables_by_the_rules(steps: int, max_run: int | None) -> None:
    tables = [
        types
        for types in product(CANDIDATES, repeat=steps)
        if not any(kind is not NO for kind in (*types[:2], *types[-1:]))
        and max(runs_of_cached(types), default=0) <= (max_run or steps)
    ]
    best = max(speedup_of(types, COSTS) for types in tables)
    assert speedup_of(fastest(steps, Algorithm1(max_run=max_run)), COSTS) == best


def test_steps_whose_threshold_is_never_positive_are_out_of_reach() -> None:
    types = fastest(12, Algorithm1(a=-0.1, k=0.2))
    assert [step for step, kind in enumerate(types) if kind is not NO] == [2, 3, 4]
    assert set(fastest(12, Algorithm1(a=0, k=0))) == {NO}


def test_loose_thresholds_reach_it() -> None:
    loose = FEW | {"algorithm": Algorithm1(a=1e6, k=1e6)}
    assert list(calibrate(model(), **loose).step_types) == fastest(STEPS, Algorithm1())


BEYOND: dict[str, tuple[dict[str, object], float, str]] = {
    "too much": ({}, 20.0, r"target_speedup=20 is outside \[1, 1\.\d\d\].* 8 steps with max_run=3 .*ask for less"),
    "no limit": ({"algorithm": Algorithm1(max_run=None)}, 20.0, r"MACs of 8 steps allow"),
    "three steps": ({"steps": 3}, 1.5, r"target_speedup=1.5 is outside \[1, 1.00\].* 3 steps .* more steps"),
    "one step": ({"steps": 1}, 1.1, r"\[1, 1.00\]"),
    "no threshold": ({"algorithm": Algorithm1(a=0, k=0)}, 1.5, r"\[1, 1.00\]"),
    "infinite": ({}, float("inf"), "target_speedup=inf"),
    "not a number": ({}, float("nan"), "target_speedup=nan"),
    "a word": ({}, "fast", "target_speedup='fast' is no number; pass one of at least 1"),
    "below 1": ({}, 0.99, r"target_speedup=0.99 is outside \[1, "),
}


@pytest.mark.parametrize(("changes", "target", "message"), BEYOND.values(), ids=BEYOND)
def test_what_no_table_can_reach_is_refused_before_any_step(
    changes: dict[str, object], target: Any, message: str
) -> None:
    heard: list[int] = []
    with pytest.raises(InputError, match=message) as caught:
        calibrate(model(), **(FEW | changes), target_speedup=target, on_step=heard.append)
    assert "\n" not in str(caught.value)
    assert not heard


def test_the_reach_as_it_is_printed_can_be_asked_for() -> None:
    reach = speedup_of(fastest(STEPS, Algorithm1()), step_costs(DiTDenoiser(model()).shape))
    for target in (round(reach, 2), reach):
        assert speedup(calibrate(model(), **FEW, target_speedup=target)) == pytest.approx(reach)


# --------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("tightness", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("target", [1.0, 1.1, 1.2, 1.3, 1.4])
def test_it_ends_as_near_as_one_vote_allows(target: float, tightness: float) -> None:
    algorithm = Algorithm1(a=0.002 * tightness, k=0.02 * tightness)
    table = calibrate(model(), **(FEW | {"algorithm": algorithm}), target_speedup=target)
    made = table.made
    assert made is not None
    assert made.options["target_speedup"] == target
    assert made.options["speedup"] == pytest.approx(speedup(table), abs=1e-4)
    costs = step_costs(DiTDenoiser(model()).shape)
    coarse = (costs[NO] - costs[ATTN_MLP]) / (STEPS * costs[NO])  # one step more or less, of the run's cost
    assert abs(1 / speedup(table) - 1 / target) <= coarse / 2 + 1e-9


def test_the_cost_is_counted(tmp_path: Path) -> None:
    heard: list[int] = []
    tight = FEW | {"algorithm": Algorithm1(a=2e-5, k=2e-4)}
    table = calibrate(model(), **tight, target_speedup=1.4, on_step=heard.append)
    assert table.made is not None
    options = table.made.options
    assert sum(heard) == options["rounds"] * 3 * STEPS  # the last round's votes are those of the table
    assert 2 < options["rounds"] < ROUNDS
    costs = step_costs(DiTDenoiser(model()).shape)
    vote = 1 + (STEPS - 3) * (costs[ATTENTION] + costs[ATTN_MLP]) / (STEPS * costs[NO])
    assert options["samplings"] == pytest.approx(options["rounds"] * 3 * vote, abs=0.06)
    assert options["samplings_a_sample"] == pytest.approx(options["rounds"] * vote, abs=1e-3)


def test_the_table_goes_on_from_the_votes_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_voting, "SEARCH_SAMPLES", 2)
    heard: list[int] = []
    searched = calibrate(model(), **FEW, target_speedup=1.2, on_step=heard.append)
    assert searched.made is not None
    assert sum(heard) == (2 * searched.made.options["rounds"] + 1) * STEPS
    monkeypatch.undo()
    assert searched.step_types == calibrate(model(), **FEW, target_speedup=1.2).step_types


def test_what_is_to_come_is_said_and_becomes_less() -> None:
    done, said = [0], []
    tight = FEW | {"algorithm": Algorithm1(a=2e-5, k=2e-4)}

    def on_total(to_come: int) -> None:
        said.append(done[0] + to_come)

    def on_step(samples: int) -> None:
        done[0] += samples

    calibrate(model(), **tight, target_speedup=1.4, on_step=on_step, on_total=on_total)
    assert said[0] == ROUNDS * 3 * STEPS
    assert said == sorted(said, reverse=True)
    assert said[-1] == done[0]


def test_a_target_that_is_missed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        calibrate(model(), **FEW, target_speedup=1.0)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        table = calibrate(model(), **(FEW | {"steps": 4}), target_speedup=1.11)  # one step that may be cached
    assert f"the table has {speedup(table):.2f}x by MACs, not target_speedup=1.11" in caplog.text


# -------------------------------------------------------------------------------------------------- giving back


def tally_of(votes: list[list[int]], errors: list[list[float]] | None = None) -> Tally:
    counted = np.array(votes)
    return Tally(counted, np.zeros(counted.shape) if errors is None else np.array(errors), int(counted[0].sum()))


def test_the_fewest_votes_go_first() -> None:
    tally = tally_of([[9, 0, 0], [9, 0, 0], [0, 1, 8], [0, 4, 5], [0, 0, 9], [9, 0, 0]])
    types = [NO, NO, ATTN_MLP, ATTN_MLP, ATTN_MLP, NO]
    assert give_back(types, tally, Algorithm1(), 1.7, COSTS) == [NO, NO, ATTN_MLP, ATTENTION, ATTN_MLP, NO]
    # All nine voted for ATTENTION or less at step 3, and eight for ATTN_MLP at step 2.
    assert give_back(types, tally, Algorithm1(), 1.5, COSTS)[2:4] == [ATTENTION, ATTENTION]
    assert give_back(types, tally, Algorithm1(), 1.0, COSTS) == [NO] * 6


def test_of_equal_votes_the_largest_error_for_its_threshold_goes_first() -> None:
    votes = [[9, 0, 0], [9, 0, 0], [0, 0, 9], [0, 0, 9], [9, 0, 0]]
    types = [NO, NO, ATTN_MLP, ATTN_MLP, NO]
    errors = [[0, 0, 0], [0, 0, 0], [0, 0, 0.7], [0, 0, 0.5], [0, 0, 0]]
    flat, rising = Algorithm1(a=1, k=0), Algorithm1(a=0.01, k=1)
    assert give_back(types, tally_of(votes, errors), flat, 1.4, COSTS)[2:4] == [ATTENTION, ATTN_MLP]
    assert give_back(types, tally_of(votes, errors), rising, 1.4, COSTS)[2:4] == [ATTN_MLP, ATTENTION]


@given(st.lists(st.sampled_from(CANDIDATES), min_size=3, max_size=12), st.floats(1, 4), st.randoms())
def test_no_table_on_the_way_is_nearer(types: list[StepType], target: float, random: Callable[..., object]) -> None:
    votes = [[random.randint(0, 5) for _ in CANDIDATES] for _ in types]
    types[0] = NO
    tally = Tally(np.array(votes), np.zeros((len(types), 3)), 15)
    found = give_back(types, tally, Algorithm1(), target, COSTS)
    assert all(ours <= before for ours, before in zip(found, types, strict=True))  # never cheaper than was voted
    if speedup_of(types, COSTS) <= target:
        assert found == types
        return
    more = speedup_of(found, COSTS)
    assert abs(more - target) <= abs(speedup_of(types, COSTS) - target)
    assert abs(more - target) <= abs(1 - target)
