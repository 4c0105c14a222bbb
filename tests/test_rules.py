"""Rules of steps against a naive float64 loop over the model's own layers, eagerly and as fake graphs."""

from fractions import Fraction

import pytest
import torch
from fake_graphs import FakeGraphs
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_rules import DEPTH, FULL, LABELS, MODEL, ROWS, SITES, TIMESTEPS, latents, naive, ours
from tiny import relative_error

from ebcache_fast import enable, enabled, stats
from ebcache_fast.errors import TableError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import (
    COMPUTE,
    REUSE,
    Branch,
    Compute,
    Forecast,
    ForecastSpan,
    FullAndWindow,
    KeepSpan,
    Plan,
    Reuse,
    Rule,
    SharedByGuidance,
    SkipSpan,
    StepPlan,
    StepType,
    Tokens,
    Window,
    layered,
)
from ebcache_fast.plan.factors import LAWS
from ebcache_fast.plan.rules import Refill
from ebcache_fast.plan.spans import SpanRule


def each(attention: Rule, mlp: Rule) -> StepPlan:
    """The same rules in all layers."""
    return StepPlan(SITES, (attention, mlp) * DEPTH)


def stack(*spans: SpanRule) -> StepPlan:
    """Everything computed but for what spans say."""
    return StepPlan(SITES, (COMPUTE,) * 6, spans)


def plan_of(*steps: StepPlan) -> Plan:
    return Plan(steps, TIMESTEPS[: len(steps)])


W, K = 5, 6
CASES: dict[str, tuple[StepPlan, ...]] = {
    "reuse": (FULL, each(REUSE, COMPUTE), each(REUSE, REUSE)),
    "forecast of order 0": (FULL, each(Forecast(0), Forecast(0))),
    "forecast of order 1": (FULL, each(Compute(1), Compute(1)), *[each(Forecast(1), Forecast(1))] * 2),
    "forecast of order 2, unevenly": (
        FULL,
        each(Compute(1), Compute(1)),
        each(Forecast(1), Compute(2)),
        each(Compute(2), Forecast(2)),
        each(Forecast(2), Forecast(2)),
        each(Compute(0), REUSE),
        each(Forecast(2), Forecast(2)),
    ),
    **{
        f"forecast by {law}": (
            FULL,
            *(each(Compute(age), Compute(age)) for age in (1, 2, 0)),
            *[each(Forecast(2, law), Forecast(2, law))] * 2,
            each(Compute(1), Compute(1)),
            each(Forecast(2, law), Forecast(1, law)),
        )
        for law in LAWS
    },
    "tokens": (FULL, each(REUSE, Tokens(K)), each(REUSE, Tokens(1)), each(REUSE, REUSE)),
    "all tokens": (FULL, each(REUSE, Tokens(16))),
    "window": (each(FullAndWindow(W), COMPUTE), *[each(Window(W), COMPUTE)] * 2, each(REUSE, REUSE)),
    "window and reuse": (each(FullAndWindow(W), COMPUTE), each(Window(W), REUSE), each(REUSE, Tokens(K))),
    "span": (
        StepPlan(SITES, (COMPUTE,) * 6, (KeepSpan(2, 5),)),
        StepPlan(SITES, (COMPUTE,) * 6, (SkipSpan(2, 5),)),
        StepPlan(SITES, (REUSE, *[COMPUTE] * 5), (SkipSpan(2, 5),)),
    ),
    "spans": (
        StepPlan(SITES, (COMPUTE,) * 6, (KeepSpan(0, 1), KeepSpan(2, 2), KeepSpan(4, 5))),
        StepPlan(SITES, (COMPUTE,) * 6, (SkipSpan(0, 1), SkipSpan(4, 5))),
        StepPlan(SITES, (COMPUTE,) * 6, (SkipSpan(2, 2),)),
        StepPlan(SITES, (REUSE,) * 6, (SkipSpan(0, 1), SkipSpan(2, 2), SkipSpan(4, 5))),
    ),
    **{
        f"the whole model by {law}": (
            stack(KeepSpan(0, 5)),
            stack(ForecastSpan(0, 5, 0, law)),
            stack(KeepSpan(0, 5, 1)),
            stack(ForecastSpan(0, 5, 1, law)),
            stack(KeepSpan(0, 5, 2)),
            *[stack(ForecastSpan(0, 5, 2, law))] * 2,
        )
        for law in LAWS
    },
    "forecasts of two spans": (
        stack(KeepSpan(0, 2), KeepSpan(3, 5)),
        stack(KeepSpan(0, 2, 1), KeepSpan(3, 5, 1)),
        stack(ForecastSpan(0, 2, 1), ForecastSpan(3, 5, 1)),
        stack(ForecastSpan(3, 5, 1)),
    ),
    "the whole model": (
        StepPlan(SITES, (COMPUTE,) * 6, (KeepSpan(0, 5),)),
        *[StepPlan(SITES, (COMPUTE,) * 6, (SkipSpan(0, 5),))] * 2,
    ),
}
GUIDED: dict[str, tuple[StepPlan, ...]] = {
    "shared attention": (FULL, each(SharedByGuidance(), COMPUTE), each(REUSE, REUSE)),
    "all shared": (each(SharedByGuidance(), SharedByGuidance()), each(REUSE, SharedByGuidance())),
}
EVERY = {name: (steps, False) for name, steps in CASES.items()} | {
    name: (steps, True) for name, steps in GUIDED.items()
}


@pytest.mark.parametrize(("steps", "guided"), EVERY.values(), ids=EVERY)
def test_against_the_naive_loop(steps: tuple[StepPlan, ...], guided: bool) -> None:
    plan = plan_of(*steps)
    xs = latents(len(plan))
    for mine, theirs in zip(ours(plan, xs, guided=guided), naive(plan, xs, LABELS), strict=True):
        assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize(("steps", "guided"), EVERY.values(), ids=EVERY)
def test_as_graphs(steps: tuple[StepPlan, ...], guided: bool) -> None:
    """Captured once for each distinct step, and to the bit what they are eagerly."""
    plan, graphs = plan_of(*steps), FakeGraphs()
    xs = latents(len(plan))
    captured = ours(plan, xs, guided=guided, graphs=graphs)
    assert all(map(torch.equal, captured, ours(plan, xs, guided=guided)))
    assert graphs.captures == len({*plan.steps, plan.refill} - {None})


@settings(max_examples=50)
@given(st.data())
def test_any_mixture(data: st.DataObject) -> None:
    attention = st.sampled_from((COMPUTE, REUSE, FullAndWindow(W), Window(W), Forecast(0)))
    mlp = st.sampled_from((COMPUTE, REUSE, Tokens(K), Forecast(0)))
    rows = data.draw(st.lists(st.tuples(*[attention, mlp] * DEPTH), min_size=1, max_size=4))
    plan = plan_of(each(FullAndWindow(W), COMPUTE), *(StepPlan(SITES, row) for row in rows))
    xs = latents(len(plan))
    for mine, theirs in zip(ours(plan, xs), naive(plan, xs, LABELS), strict=True):
        assert relative_error(mine, theirs) < 1e-12


# ------------------------------------------------------------------------------------------------ factors


@pytest.mark.parametrize("law", LAWS)
@given(steps=st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True), ahead=st.integers(1, 9))
def test_a_forecast_is_exact_where_it_must_be(law: str, steps: list[int], ahead: int) -> None:
    """Factors add up to one; a line is carried on by all laws but Hermite's, which takes half of the slope."""
    recent, factors_of = sorted(steps, reverse=True), LAWS[law]
    now = recent[0] + ahead
    factors = factors_of(recent, now)
    assert (len(factors), sum(factors)) == (len(recent), 1)
    if len(recent) > 1:
        carried_on = Fraction(ahead, 2 if law == "hermite" else 1)
        assert sum(f * s for f, s in zip(factors, recent, strict=True)) == recent[0] + carried_on
    if law == "newton":
        power = len(recent) - 1
        assert sum(f * s**power for f, s in zip(factors, recent, strict=True)) == now**power


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: each(COMPUTE, Window(3)), r"0\.mlp: window: expected SELF_ATTN, got MLP; "),
        (lambda: each(Window(0), COMPUTE), r"0\.self_attn: window: expected 1 token or more, got 0"),
        (lambda: each(Tokens(3), COMPUTE), r"0\.self_attn: tokens: expected MLP, .*got SELF_ATTN; "),
        (lambda: each(COMPUTE, Tokens(0)), r"0\.mlp: tokens: expected 1 or more, got 0"),
        (lambda: each(Forecast(-1), COMPUTE), r"0\.self_attn: order: expected 0 to 4, got -1"),
        (lambda: each(Forecast(5), COMPUTE), r"0\.self_attn: order: expected 0 to 4, got 5"),
        (lambda: each(Forecast(1, "euler"), COMPUTE), r"self_attn: law: expected one of taylor, .*, got 'euler'$"),
        (lambda: each(Forecast(1, []), COMPUTE), r"self_attn: law: expected one of taylor, .*, got \[\]$"),
        (lambda: stack(ForecastSpan(0, 5, 5)), r"^span 0 to 5: order: expected 0 to 4, got 5"),
        (lambda: stack(ForecastSpan(0, 5, 1, "euler")), r"^span 0 to 5: law: expected one of taylor, .* 'euler'$"),
        (lambda: stack(KeepSpan(0, 5, -1)), r"^span 0 to 5: age: expected 0 or more, got -1$"),
        (lambda: stack(KeepSpan(0, 5, 0, 0)), r"^span 0 to 5: ages: expected 1 or more, got 0$"),
        (lambda: each(Refill(0), COMPUTE), r"^0\.self_attn: ages: expected 1 or more, got 0$"),
        (
            lambda: plan_of(stack(KeepSpan(0, 5)), stack(ForecastSpan(0, 5, 1))),
            r"steps\[1\]: .* reads its change of age 1, .* KeepSpan\(0, 5, 1\)$",
        ),
        (lambda: each(Reuse(-1), COMPUTE), r"0\.self_attn: age: expected 0 or more, got -1"),
        (lambda: each(Compute(-1), COMPUTE), r"0\.self_attn: age: expected 0 or more, got -1"),
        (lambda: StepPlan(SITES, (COMPUTE,) * 6, (KeepSpan(4, 6),)), r"span 4 to 6: expected sites from 0 to 5"),
        (lambda: StepPlan(SITES, (COMPUTE,) * 6, (KeepSpan(0, 2), KeepSpan(2, 3))), r"span 2 to 3: .* from 3 to 5"),
        (lambda: StepPlan(SITES, (COMPUTE,) * 6, (KeepSpan(3, 2),)), r"span 3 to 2: "),
        (
            lambda: plan_of(FULL, each(Forecast(1), REUSE)),
            r"steps\[1\]: SELF_ATTN of layer 0 reads its output of age 1, .* Compute\(1\)$",
        ),
        (
            lambda: plan_of(FULL, each(Window(3), REUSE)),
            r"steps\[1\]: SELF_ATTN of layer 0 reads its rest 3, .* FullAndWindow\(3\)$",
        ),
        (
            lambda: plan_of(FULL, StepPlan(SITES, (COMPUTE,) * 6, (SkipSpan(0, 1),))),
            r"steps\[1\]: .* reads its change, .* KeepSpan\(0, 1\)$",
        ),
        (
            lambda: plan_of(each(FullAndWindow(5), COMPUTE), each(Window(1), COMPUTE)),
            r"its rest 1, .* FullAndWindow\(1\)$",
        ),
        (lambda: each(Window("a"), COMPUTE), r"0\.self_attn: window: expected 1 token or more, got 'a'"),
        (lambda: each(Window(2.5), COMPUTE), r"0\.self_attn: window: expected 1 token or more, got 2\.5"),
        (lambda: each(COMPUTE, Tokens(True)), r"0\.mlp: tokens: expected 1 or more, got True"),
        (lambda: each(Compute(None), COMPUTE), r"0\.self_attn: age: expected 0 or more, got None"),
        (lambda: each(Forecast(1.5), COMPUTE), r"0\.self_attn: order: expected 0 to 4, got 1\.5"),
        (lambda: StepPlan(SITES, (COMPUTE,) * 6, (KeepSpan("a", 2),)), r"span 'a' to 2: expected sites from 0 to 5"),
        (lambda: each(KeepSpan(0, 1), COMPUTE), r"0\.self_attn: expected a rule of sites, such as Compute\(\), got "),
        (lambda: each(Compute, COMPUTE), r"0\.self_attn: expected a rule of sites, such as Compute\(\), got "),
        (lambda: StepPlan(SITES, (COMPUTE,) * 6, (COMPUTE,)), r"^spans: expected rules of spans, such as KeepSpan"),
        (lambda: plan_of("NO_CACHE"), r"^steps: expected a StepPlan for each timestep, got 'NO_CACHE'"),
        (lambda: Plan((FULL,), (1,), "1"), r"^eps_scale: expected a finite number above 0, got '1'"),
        (lambda: plan_of(FULL, each(REUSE, Tokens(17))).macs(as_denoiser(MODEL).shape), r"0\.mlp: tokens: .* got 17"),
        (lambda: enable(MODEL, plan_of(FULL, each(REUSE, Tokens(17)))), r"0\.mlp: tokens: .* model's 16, got 17"),
        (lambda: ours(plan_of(FULL, each(REUSE, Tokens(17))), latents(2)), r"0\.mlp: tokens: .* model's 16, got 17"),
        (lambda: ours(plan_of(each(SharedByGuidance(), COMPUTE)), latents(1)), r"a share needs classifier-free"),
    ],
)
def test_what_does_not_fit_is_one_typed_line(make: object, problem: str) -> None:
    with pytest.raises(TableError, match=problem) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_spans_make_a_step_mixed_and_only_those_that_skip_run_less() -> None:
    kept, skipped = (StepPlan(SITES, (COMPUTE,) * 6, (span,)) for span in (KeepSpan(2, 3), SkipSpan(2, 3)))
    assert [(step.step_type, step.computed, step.reused) for step in (FULL, kept, skipped)] == [
        (StepType.NO_CACHE, SITES, ()),
        (None, SITES, ()),
        (None, SITES[:2] + SITES[4:], SITES[2:4]),
    ]


def test_the_highest_order_of_a_forecast_fits() -> None:
    assert each(Forecast(4), REUSE).rules[0] == Forecast(4)


def test_a_window_of_one_token_fits() -> None:
    assert each(Window(1), COMPUTE).rules[0] == Window(1)


def test_a_forward_follows_no_plan_of_which_the_first_step_can_not_stand_in_for_another() -> None:
    """Whoever comes out of order would read what another run kept."""
    latent = torch.zeros(ROWS, 4, 16, 16, dtype=torch.float64)
    for steps in (
        (stack(KeepSpan(0, 3)), stack(KeepSpan(2, 5)), stack(SkipSpan(0, 3)), stack(SkipSpan(2, 5))),
        (FULL, each(FullAndWindow(W), COMPUTE), each(Window(W), COMPUTE)),
    ):
        with pytest.raises(TableError, match=r"^steps\[0\]: expected a step that keeps all that later ones read"):
            enable(MODEL, plan_of(*steps))
    plan = plan_of(*CASES["window"])
    with enabled(MODEL, plan), torch.no_grad():
        call = lambda t: MODEL(latent, torch.full((ROWS,), t), LABELS)  # noqa: E731
        full = call(TIMESTEPS[0])
        call(TIMESTEPS[1])
        assert stats(MODEL).hits == DEPTH
        assert relative_error(call(TIMESTEPS[3]), naive(plan_of(FULL), latent[None], LABELS)[0]) > 1e-3
    assert relative_error(full, naive(plan_of(FULL), latent[None], LABELS)[0]) < 1e-12


REFILLED = ["forecast of order 1", "forecast by newton", "the whole model by newton", "forecasts of two spans"]


@pytest.mark.parametrize("name", REFILLED)
def test_a_step_out_of_order_refills_all_that_forecasts_read(name: str) -> None:
    """After it a forecast is the new value, whatever was kept before."""
    plan = plan_of(*CASES[name])
    assert plan.refill is not None
    between = plan.timesteps[-1] + 1, plan.timesteps[-1]  # the first of them is not in the plan
    alone, xs = Plan((plan.refill, plan.steps[-1]), between), latents(len(plan) + 1)
    expected = naive(alone, xs[-2:], LABELS)
    with enabled(MODEL, plan), torch.no_grad():
        outs = [
            MODEL(x, torch.full((ROWS,), t), LABELS) for x, t in zip(xs, (*plan.timesteps[:-1], *between), strict=True)
        ]
        assert sum(stats(MODEL).refreshed.values()) == 1
    for found in (outs[-2:], ours(alone, xs[-2:])):
        assert max(map(relative_error, found, expected)) < 1e-12


def test_a_run_begins_with_no_step_that_goes_on_with_what_it_fills() -> None:
    """Chosen tokens are put into the output that the step before kept, and that is all that later steps read."""
    assert plan_of(FULL, each(COMPUTE, Tokens(5)), each(REUSE, REUSE)).refreshing == (True, False, False)


def test_a_call_without_guidance_under_a_plan_of_shares_is_the_models_own() -> None:
    """Somebody else's loop is not ended by it, unless strict."""
    latent, plan = torch.zeros(ROWS, 4, 16, 16, dtype=torch.float64), plan_of(FULL, each(SharedByGuidance(), REUSE))
    t = torch.full((ROWS,), TIMESTEPS[0])
    with torch.no_grad():
        own = MODEL(latent, t, LABELS)
        with enabled(MODEL, plan):
            assert torch.equal(MODEL(latent, t, LABELS), own)
            ((why, times),) = stats(MODEL).originals.items()
            assert ("a share needs classifier-free guidance" in why, times) == (True, 1)
        with (
            enabled(MODEL, plan, strict=True),
            pytest.raises(TableError, match="a share needs classifier-free guidance"),
        ):
            MODEL(latent, t, LABELS)


def test_rules_may_come_in_a_list() -> None:
    assert StepPlan(SITES, [COMPUTE] * 6) == FULL  # type: ignore[arg-type]
    assert hash(plan_of(StepPlan(SITES, [COMPUTE] * 6))) == hash(plan_of(FULL))  # type: ignore[arg-type]


def test_a_share_of_cross_attention_is_refused() -> None:
    with pytest.raises(TableError, match=r"0\.cross_attn: a share: rows attend to texts of their own"):
        StepPlan(layered(1, (Branch.CROSS_ATTN,)), (SharedByGuidance(),))
