"""FORA's plans: which steps are full, and what they cost."""

import math
from functools import cache
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebcache_fast.errors import TableError
from ebcache_fast.models import DIT_MODELS, DiTDenoiser
from ebcache_fast.plan import ModelShape, Plan, StepType
from ebcache_fast.policies import fora, fora_at_cost
from ebcache_fast.samplers.schedule import respaced_timesteps


@cache
def xl2() -> ModelShape:
    """The sizes of DiT-XL/2 at 256 pixels, without its memory."""
    # Normal numbers on the meta device load torch's compiler, which takes seconds; no number matters here.
    with torch.device("meta"), mock.patch("torch.nn.init.normal_"):
        return DiTDenoiser(DIT_MODELS["DiT-XL/2"]()).shape


def full_indices(plan: Plan) -> set[int]:
    """The step indices, counting down to 0 at the last step, of the steps that compute everything."""
    assert {step.step_type for step in plan.steps} <= {StepType.NO_CACHE, StepType.ATTN_MLP}
    return {len(plan) - 1 - k for k, step in enumerate(plan.steps) if step.step_type is StepType.NO_CACHE}


@pytest.mark.parametrize("steps", [50, 250])
@pytest.mark.parametrize("interval", [2, 3, 4])
def test_full_steps_are_the_first_and_the_multiples_of_the_interval(interval: int, steps: int) -> None:
    timesteps = respaced_timesteps(1000, steps)
    plan = fora(timesteps, interval, xl2(), eps_scale=0.98)
    assert full_indices(plan) == {i for i in range(steps) if i == steps - 1 or i % interval == 0}
    assert (plan.timesteps, plan.eps_scale) == (timesteps, 0.98)


def test_two_three_and_four_run_the_two_highest_of_fifty_steps() -> None:
    timesteps = respaced_timesteps(1000, 50)
    for interval in (2, 3, 4):  # 48 is a multiple of all three
        assert {49, 48} <= full_indices(fora(timesteps, interval, xl2()))


@pytest.mark.parametrize(("interval", "tera"), [(2, 3.09), (4, 1.67)])
def test_cost_on_the_largest_model_is_the_papers(interval: int, tera: float) -> None:
    assert round(fora(respaced_timesteps(1000, 50), interval, xl2()).macs(xl2()) / 1e12, 2) == tera


def test_an_interval_of_one_caches_nothing() -> None:
    assert full_indices(fora((9, 5, 2), 1, xl2())) == {0, 1, 2}


@given(steps=st.integers(1, 60), interval=st.floats(1, 80))
def test_a_fraction_spreads_the_full_steps_evenly(steps: int, interval: float) -> None:
    plan = fora(tuple(range(steps - 1, -1, -1)), interval, xl2())
    full = sorted(full_indices(plan))
    assert full[0] == 0
    assert full[-1] == steps - 1
    gaps = [after - before for before, after in pairwise(full)]
    assert all(gap <= math.ceil(interval) for gap in gaps)
    assert all(gap >= math.floor(interval) for gap in gaps[:-1])  # the last leads to the first executed step


@pytest.mark.parametrize("interval", [0.99, 0, -2, math.nan, math.inf])
def test_an_interval_below_one_is_refused(interval: float) -> None:
    with pytest.raises(TableError, match="interval: expected 1 or more") as caught:
        fora((2, 1, 0), interval, xl2())
    assert "\n" not in str(caught.value)


def cost_of(full: int, steps: int) -> int:
    """What a run with so many full steps costs."""
    shape = xl2()
    return steps * shape.fixed_macs + full * sum(site.macs for site in shape.site_shapes)


@settings(max_examples=40)
@given(steps=st.integers(2, 50), share=st.floats(0, 1.2))
def test_the_cost_is_the_nearest_that_whole_steps_allow(steps: int, share: float) -> None:
    wanted = int(share * cost_of(steps, steps))
    plan = fora_at_cost(tuple(range(steps - 1, -1, -1)), wanted, xl2(), eps_scale=0.9)
    possible = [cost_of(full, steps) for full in range(2, steps + 1)]
    assert abs(plan.macs(xl2()) - wanted) == min(abs(cost - wanted) for cost in possible)
    assert full_indices(plan) >= {0, steps - 1}
    assert plan.eps_scale == 0.9


def test_at_the_cost_of_an_interval_is_as_many_full_steps() -> None:
    timesteps = respaced_timesteps(1000, 50)
    for interval in (2, 3, 4):
        there = fora(timesteps, interval, xl2())
        found = fora_at_cost(timesteps, there.macs(xl2()), xl2())
        assert len(full_indices(found)) == len(full_indices(there))


def test_a_run_of_one_step_is_one_full_step() -> None:
    assert full_indices(fora_at_cost((0,), 1, xl2())) == {0}
