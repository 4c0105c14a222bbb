"""Which step a timestep is, and what is launched at once: all small plans, all timesteps."""

from itertools import product

import pytest
from constants import BRANCHES
from fake_runs import mixed_plan

from ebcache_fast.engine.step_scheduler import Dispatch, StepScheduler
from ebcache_fast.plan import LONGEST_RUN, Plan, StepType, layered

TIMESTEPS = (7, 4, 3, 0)
PLAN = Plan.from_types([StepType.NO_CACHE] * 4, TIMESTEPS, layered(2, BRANCHES))
ACROSS = [t / 2 for t in range(-3, 18)]  # planned or not, whole or not, before, between and after


@pytest.mark.parametrize("t", ACROSS)
def test_every_timestep(t: float) -> None:
    assert StepScheduler(PLAN).step_at(t) == (TIMESTEPS.index(int(t)) if t in TIMESTEPS else None)


@pytest.mark.parametrize("t", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_what_is_no_timestep_at_all_is_not_planned(t: float) -> None:
    assert StepScheduler(PLAN).step_at(t) is None


@pytest.mark.parametrize(
    ("t", "planned"),
    [(799.2, 799.2000122070312), (1000, 999), (1000.0, 999), (0.5, 0), (999, None), (12, None), (float("nan"), None)],
)
def test_a_near_miss_names_the_timestep_that_was_meant(t: float, planned: float | None) -> None:
    plan = Plan.from_types([StepType.NO_CACHE] * 4, (999, 799.2000122070312, 400, 0), layered(2, BRANCHES))
    said = StepScheduler(plan).near_miss(t)
    assert said == (
        "" if planned is None else f", {t!r} where {planned!r} is; give the model the plan's, to the last bit"
    )


@pytest.mark.parametrize("steps", range(1, 6))
def test_dispatches_of_every_plan_of_four_kinds_of_step(steps: int) -> None:
    for rows in product(("CC", "RC", "CR", "RR"), repeat=steps - 1):
        plan = mixed_plan(["CC", *rows])
        dispatches = StepScheduler(plan).dispatches()
        assert [one.plan for one in dispatches for _ in range(one.steps)] == list(plan.steps)  # all, in order
        for one, after in zip(dispatches, [*dispatches[1:], None], strict=True):
            assert 1 <= one.steps <= (LONGEST_RUN if one.plan.computes_nothing else 1)
            if after and one.plan == after.plan and one.plan.computes_nothing:
                assert one.steps == LONGEST_RUN  # no run ends early


def test_runs_as_long_as_can_be() -> None:
    plan = mixed_plan(["CC", *["RR"] * (2 * LONGEST_RUN + 1), "CC", "CC", "RR"])
    full, reuse = plan.steps[0], plan.steps[1]
    runs = [Dispatch(reuse, LONGEST_RUN), Dispatch(reuse, LONGEST_RUN), Dispatch(reuse, 1)]
    alone = Dispatch(full, 1)
    assert StepScheduler(plan).dispatches() == (alone, *runs, alone, alone, Dispatch(reuse, 1))
