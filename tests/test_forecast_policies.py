"""Policies with forecasts: which steps they compute, what they keep, and what they cost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_dit

from ebcache_fast.apps.method_spec import Setting, parse_method
from ebcache_fast.errors import InputError, TableError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Compute, Forecast, ForecastSpan, KeepSpan, Plan, StepType, lower
from ebcache_fast.policies import forecast, taylorseer

SHAPE = as_denoiser(tiny_dit(0, depth=3)).shape


def timesteps(steps: int) -> tuple[int, ...]:
    return tuple(range(10 * steps, 0, -10))


def computed(plan: Plan) -> list[int]:
    return [i for i, step in enumerate(plan.steps) if step.computed]


@given(st.integers(1, 30), st.integers(0, 3), st.sampled_from(["stack", "branches"]), st.data())
def test_a_forecast_reads_the_last_computed_steps_and_no_others(
    steps: int, order: int, of: str, data: st.DataObject
) -> None:
    """By the kept ages' own bookkeeping: what a forecast of order n reads are the n + 1 steps computed last."""
    chosen = [0, *sorted(data.draw(st.sets(st.integers(0, steps - 1))) - {0})]
    plan = forecast(timesteps(steps), SHAPE, chosen, order, of=of)  # type: ignore[arg-type]
    assert computed(plan) == chosen
    held: dict[int, int] = {}  # age: of which step
    for i, step in enumerate(plan.steps):
        rule = step.spans[0] if of == "stack" else step.rules[0]
        assert of == "stack" or set(step.rules) == {rule}
        if i in chosen:
            assert isinstance(rule, KeepSpan | Compute)
            held[rule.age] = i
        else:
            assert isinstance(rule, ForecastSpan | Forecast)
            assert sorted(held[age] for age in range(rule.order + 1)) == [k for k in chosen if k < i][-order - 1 :]


def test_what_it_keeps() -> None:
    """Of the stack a tensor for each value that the order needs, of branches as many of each."""
    plans = {of: forecast(timesteps(9), SHAPE, [0, 2, 4, 7], 2, of=of) for of in ("stack", "branches")}  # type: ignore[arg-type]
    assert {of: len(plan.memory.live) for of, plan in plans.items()} == {"stack": 3, "branches": 3 * 6}
    full = Plan.uncached(timesteps(9), SHAPE.sites).macs(SHAPE)
    for plan in plans.values():
        assert plan.macs(SHAPE) * 9 == full * 4 + SHAPE.fixed_macs * 9 * 5


@pytest.mark.parametrize("samples", [True, False])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_of_the_stack_takes_no_more_launches_than_a_step_that_reuses_all(order: int, samples: bool) -> None:
    """In our own loop, where several run at once, and in anybody else's; and it is one graph, whatever the weights."""
    plan = forecast(timesteps(12), SHAPE, [0, 2, 4, 7], order)
    reusing = Plan.from_types([StepType.NO_CACHE, StepType.ATTN_MLP], timesteps(2), SHAPE.sites)
    found = {
        len(lower(step, SHAPE.site_shapes, whole.memory, samples=samples))
        for whole, step in ((plan, plan.steps[-1]), (reusing, reusing.steps[-1]))
    }
    assert found == {2 if samples else 3}
    assert len({plan.steps[i] for i in (5, 6, 8, 9, 10, 11)}) == 1
    assert plan.steps[-1] in plan.collapsing


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [(10, 3, [0, 3, 6, 9]), (10, 1, list(range(10))), (10, 2.5, [0, 2, 5, 7]), (7, 50, [0]), (8, 4, [0, 4])],
)
def test_a_fixed_interval(steps: int, interval: float, expected: list[int]) -> None:
    assert computed(taylorseer(timesteps(steps), interval, SHAPE)) == expected


@pytest.mark.parametrize(("name", "law"), [("taylorseer", "taylor"), ("hicache", "hermite")])
def test_by_name(name: str, law: str) -> None:
    setting = Setting(SHAPE, 10, "ddim")
    for text, order in ((f"{name}:4", 1), (f"{name}:4:2", 2)):
        plan = parse_method(text, setting).plan
        assert plan == taylorseer(setting.timesteps, 4, SHAPE, order, law)
        assert plan.steps[9].rules[0] == Forecast(order, law)
        assert plan.steps[0].step_type is StepType.NO_CACHE
    for bad in (f"{name}:x", f"{name}:2:x", name):
        with pytest.raises(InputError, match=f"^method '{bad}'"):
            parse_method(bad, setting)
    for bad in (f"{name}:0.5", f"{name}:nan", f"{name}:2:9"):
        with pytest.raises(TableError, match=f"^method '{bad}'"):
            parse_method(bad, setting)


def test_an_interval_below_one() -> None:
    for interval in (0, 0.99, -1, math.inf, math.nan):
        with pytest.raises(TableError, match=r"^interval: expected 1 or more, got "):
            taylorseer(timesteps(5), interval, SHAPE)
