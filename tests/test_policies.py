"""Every policy: its schedule restated, its run against a naive loop and as graphs, its cost on DiT-XL/2, bad input."""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fake_graphs import FakeGraphs
from naive_rules import LABELS, MODEL, SITES, TIMESTEPS, latents, naive, ours
from tiny import relative_error

from ebcache_fast.apps.method_spec import Setting, parse_method
from ebcache_fast.errors import EBCacheError, TableError
from ebcache_fast.models import DIT_MODELS, as_denoiser
from ebcache_fast.models.router_file import read_router
from ebcache_fast.plan import COMPUTE, REUSE, Branch, KeepSpan, ModelShape, Plan, SkipSpan, StepType, Tokens, lower
from ebcache_fast.policies import BUILT_IN, delta_dit, ditfastattn, fora, forecast, l2c, pab, power, taylorseer, toca
from ebcache_fast.samplers import make_sampler

SHAPE = as_denoiser(MODEL).shape
SCORES = {index: [(7 * index + 3 * site) % 10 / 10 for site in range(len(SITES))] for index in range(0, 8, 2)}
CHOICES = (
    *("full full full", "window reuse full", "window full reuse", "full window reuse"),
    *("reuse window reuse", "window reuse full", "reuse reuse window", "full full window"),
)
SELF, MLP = Branch.SELF_ATTN, Branch.MLP


@cache
def dit_xl() -> ModelShape:
    # Normal numbers on the meta device load torch's compiler, which takes seconds; no number matters here.
    with torch.device("meta"), mock.patch("torch.nn.init.normal_"):
        return as_denoiser(DIT_MODELS["DiT-XL/2"](input_size=32)).shape


PLANS: dict[str, Plan] = {
    "fora": fora(TIMESTEPS, 3, SHAPE),
    "taylorseer": taylorseer(TIMESTEPS, 2.5, SHAPE, 2),
    "hicache": taylorseer(TIMESTEPS, 3, SHAPE, 2, "hermite"),
    "power": power(TIMESTEPS, SHAPE, 4, 2),
    "forecast of the stack": forecast(TIMESTEPS, SHAPE, [0, 1, 3, 6], 2),
    "forecast of branches": forecast(TIMESTEPS, SHAPE, [0, 1, 3, 6], 2, "adams-bashforth", "branches"),
    "pab": pab(TIMESTEPS, SHAPE, {SELF: 2, MLP: 3}, (50, 850)),
    "l2c": l2c(TIMESTEPS, SHAPE, SCORES, 0.4),
    "toca": toca(TIMESTEPS, SHAPE, 3, 0.2),
    "delta-dit": delta_dit(TIMESTEPS, SHAPE, 2, 3),
    "ditfastattn": ditfastattn(TIMESTEPS, SHAPE, [row.split() for row in CHOICES], 5),
}
GUIDED = ditfastattn(TIMESTEPS[:4], SHAPE, [["full"] * 3, ["share"] * 3, ["reuse", "share", "full"], ["reuse"] * 3], 5)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_run_is_that_of_the_naive_loop(plan: Plan) -> None:
    xs = latents(len(plan))
    for mine, theirs in zip(ours(plan, xs), naive(plan, xs, LABELS), strict=True):
        assert relative_error(mine, theirs) < 1e-12


def test_a_share_is_that_of_the_naive_loop() -> None:
    xs = latents(len(GUIDED))
    for mine, theirs in zip(ours(GUIDED, xs, guided=True), naive(GUIDED, xs, LABELS), strict=True):
        assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_run_of_graphs_is_the_eager_one_to_the_bit(plan: Plan) -> None:
    graphs, xs = FakeGraphs(), latents(len(plan))
    captured = ours(plan, xs, graphs=graphs)
    assert all(map(torch.equal, captured, ours(plan, xs)))
    assert graphs.captures == len({*plan.steps, plan.refill} - {None})


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_step_that_computes_nothing_takes_no_more_launches_than_one_that_reuses_all(plan: Plan) -> None:
    reusing = Plan.from_types([StepType.NO_CACHE, StepType.ATTN_MLP], (9, 1), SITES)
    most = len(lower(reusing.steps[1], SHAPE.site_shapes, reusing.memory, samples=True))
    for step in plan.steps:
        if step.computes_nothing and len(plan.memory.live) <= len(SITES):
            assert len(lower(step, SHAPE.site_shapes, plan.memory, samples=True)) <= most


# -------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("interval", [1, 3, 4])
def test_toca(steps: int, interval: int) -> None:
    """By counting down from each full step, as their code counts up to it."""
    plan = toca(tuple(range(steps))[::-1], dit_xl(), interval, 0.1)
    full, since = [], 0
    threshold = 0.0
    for i in range(steps - 1, -1, -1):
        since += 1
        if i == steps - 1 or since >= threshold:
            full.append(steps - 1 - i)
            since = 0
            threshold = round(interval / (1.4 - 0.8 * i / steps))
            if steps * 0.2 <= i < steps * 0.4:
                threshold = min(2, interval)
    assert [i for i, step in enumerate(plan.steps) if step.step_type is StepType.NO_CACHE] == full
    for executed, step in enumerate(plan.steps):
        if executed in full:
            continue
        for site, rule in zip(step.sites, step.rules, strict=True):
            if site.branch is SELF:
                assert rule == REUSE
                continue
            i = steps - 1 - executed
            share = 0.1 * (0.8 + 0.4 * site.layer / 27) * (3 - 4 * i / steps) * 2.5
            count = int(max(0, share) * 256)
            assert rule == (Tokens(count) if count else REUSE)


def test_all_tokens_are_the_branch_itself() -> None:
    plan = toca(TIMESTEPS, SHAPE, 8, 1.0)
    assert {rule for step in plan.steps for rule in step.rules[1::2]} >= {COMPUTE}
    assert set(toca(TIMESTEPS, SHAPE, 4, 0.0).counts()) == {StepType.NO_CACHE, StepType.ATTN_MLP}


def test_pab() -> None:
    plan = pab((990, 800, 600, 400, 200, 90), SHAPE, {SELF: 2, MLP: 3})
    reused = [sorted({site.branch.name for site in step.reused}) for step in plan.steps]
    assert reused == [[], ["MLP", "SELF_ATTN"], ["MLP"], ["SELF_ATTN"], ["MLP"], []]
    preset = parse_method("pab:cogvideox", Setting(SHAPE, 10, "ddim")).plan
    assert {site.branch for step in preset.steps for site in step.reused} == {SELF}
    assert parse_method("pab:2", Setting(SHAPE, 10, "ddim")).plan == preset


def test_l2c() -> None:
    for executed, step in enumerate(PLANS["l2c"].steps):
        index = 7 - executed
        is_full = index % 2 == 1 or executed == 0
        row = [1.0] * len(SITES) if is_full else SCORES[index]
        assert list(step.computed) == [site for site, score in zip(SITES, row, strict=True) if score > 0.4]
    odd = l2c(TIMESTEPS[:5], SHAPE, dict.fromkeys((0, 2), SCORES[0]))
    assert [len(step.computed) for step in odd.steps] == [6, 6, 5, 6, 5]  # the first of an odd number of steps is full


def test_delta_dit() -> None:
    """Rear layers until two fifths of the run are left, front ones then; the boundary is a full step of its own."""
    plan = delta_dit(tuple(range(10))[::-1], SHAPE, 1, 3)
    rear, front = (4, 5), (0, 1)
    spans = [step.spans[0] for step in plan.steps]
    assert spans == [
        *(KeepSpan(*rear), SkipSpan(*rear), SkipSpan(*rear), KeepSpan(*rear), SkipSpan(*rear)),
        *(KeepSpan(*front), KeepSpan(*front), SkipSpan(*front), SkipSpan(*front), KeepSpan(*front)),
    ]
    assert delta_dit((3, 2), SHAPE, 3).steps[1].spans == (SkipSpan(0, 5),)


def test_ditfastattn() -> None:
    """Only where a window follows is its difference kept, and MLPs are computed at all steps."""
    rules = [[type(rule).__name__ for rule in step.rules[::2]] for step in PLANS["ditfastattn"].steps]
    assert rules[0] == ["FullAndWindow", "Compute", "Compute"]
    assert [row[1] for row in rules] == [
        *("Compute", "Reuse", "FullAndWindow", "Window", "Window", "Reuse", "Reuse", "Compute"),
    ]
    assert {rule for step in PLANS["ditfastattn"].steps for rule in step.rules[1::2]} == {COMPUTE}


@pytest.mark.parametrize(("steps", "computed"), [(20, 8), (50, 19), (10, 10), (5, 1)])
def test_power(steps: int, computed: int) -> None:
    plan = power(tuple(range(steps))[::-1], SHAPE, computed)
    found = [i for i, step in enumerate(plan.steps) if step.computed]
    asked = [round((steps - 1) * (n / computed) ** (2 / 3)) for n in range(computed)]
    assert len(found) == computed
    assert all(abs(mine - theirs) <= 2 for mine, theirs in zip(found, asked, strict=True))
    assert found == asked or len(set(asked)) < computed


# ------------------------------------------------------------------------------------------------------ costs


def test_costs_on_dit_xl() -> None:
    """T multiply-accumulates of one guidance branch, as the papers and the check of them say."""
    macs: Callable[[Plan], float] = lambda plan: plan.macs(dit_xl()) / 1e12  # noqa: E731
    fifty, long = (make_sampler("ddpm", steps).timesteps for steps in (50, 250))
    assert [macs(fora(fifty, n, dit_xl())) for n in (2, 4)] == pytest.approx([3.09, 1.67], abs=0.005)
    # Within 3%: how the code rounds the last share of tokens is not said.
    assert [macs(toca(steps, dit_xl(), 4, 0.1)) for steps in (fifty, long)] == pytest.approx([2.40, 11.84], rel=0.03)


# ---------------------------------------------------------------------------------------------------- routers


def router(steps: int = 8, sites: int = len(SITES)) -> "OrderedDict[str, torch.Tensor]":
    """Logits whose sigmoids are the tests' scores at even indices."""
    scores = {i: SCORES.get(i, [0.5] * len(SITES)) for i in range(steps)}
    return OrderedDict((f"{i}.prob", torch.logit(torch.tensor(row[:sites]), eps=1e-6)) for i, row in scores.items())


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_released_router_is_read(is_whole: bool, tmp_path: Path) -> None:
    file = tmp_path / "router.pt"
    whole = {"routers": router(), "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XL/2", lr=0.001)}
    torch.save(whole if is_whole else router(), file)
    scores = read_router(file)
    assert sorted(scores) == list(range(8))
    for index, row in SCORES.items():
        assert scores[index] == pytest.approx(row, abs=1e-5)
    setting = Setting(SHAPE, 8, "ddim")
    for text, threshold in ((f"l2c:{file}", 0.1), (f"l2c:{file}:0.45", 0.45)):
        assert parse_method(text, setting).plan == l2c(setting.timesteps, SHAPE, scores, threshold)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"nothing", "is no router of Learning-to-Cache: "),
        (b"", "is no router of Learning-to-Cache: "),
        ({"routers": router(), "args": Fraction(1, 2)}, "is no router of Learning-to-Cache: Weights only load failed"),
        ({"routers": {"0.weight": torch.zeros(2)}}, r"routers: expected vectors named INDEX\.prob, got '0\.weight'"),
        ({"routers": {"0.prob": torch.zeros(2, 2)}}, r"routers: expected vectors named INDEX\.prob"),
        ({"routers": {"0.prob": 3}}, r"routers: expected vectors named INDEX\.prob"),
        ({"routers": {"1.prob": torch.zeros(2)}}, r"routers: expected indices from 0 on, got \[1\]"),
        ({"routers": {}}, r"routers: expected indices from 0 on, got \[\]"),
        ([1, 2], r"routers: expected indices from 0 on, got \[\]"),
        ({"routers": router(6)}, "expected a router of 8 steps, got one of 6"),
        ({"routers": router(8, 4)}, r"scores\[6\]: expected 6, one for each branch of the model, got 4"),
    ],
)
def test_another_file_is_refused(content: Any, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "router.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(TableError, match=problem) as caught:
        parse_method(f"l2c:{file}", Setting(SHAPE, 8, "ddim"))
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("toca:0", "interval: expected a whole number from 1 on, got 0"),
        ("toca:4:1.5", r"ratio: expected 0 to 1, a share of all tokens, got 1\.5"),
        ("toca:4:nan", "ratio: expected 0 to 1, a share of all tokens, got nan"),
        ("toca:x", "invalid literal"),
        ("pab:0", r"intervals\[SELF_ATTN\]: expected a whole number from 1 on, got 0"),
        ("pab:-1", r"intervals\[SELF_ATTN\]: expected a whole number from 1 on, got -1"),
        ("pab:latte", "expected an interval, or one of cogvideox, open-sora, got 'latte'"),
        ("delta-dit:0", "layers: expected 1 to 3, the model's, got 0"),
        ("delta-dit:4", "layers: expected 1 to 3, the model's, got 4"),
        ("delta-dit:1:0", "interval: expected a whole number from 1 on, got 0"),
        ("power:0", "computed: expected 1 to 8, the number of steps, got 0"),
        ("power:9", "computed: expected 1 to 8, the number of steps, got 9"),
        ("power:2.5", "invalid literal"),
        ("l2c:nowhere.pt", "nowhere.pt: is no router of Learning-to-Cache: "),
        *((name, "it takes an argument, as ") for name in BUILT_IN),
    ],
)
def test_what_a_policy_can_not_do_is_one_typed_line(text: str, problem: str) -> None:
    with pytest.raises(EBCacheError, match=problem) as caught:
        parse_method(text, Setting(SHAPE, 8, "ddim"))
    assert "\n" not in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            lambda: pab(TIMESTEPS, SHAPE, {Branch.CROSS_ATTN: 2}),
            r"expected branches of the model, SELF_ATTN, MLP, got CR",
        ),
        (lambda: ditfastattn(TIMESTEPS, SHAPE, [], 5), r"^choices: expected a row for each of 8 steps, got 0$"),
        (lambda: ditfastattn((1,), SHAPE, [["full"]], 5), r"^choices\[0\]: expected one for each of 3 layers, got 1$"),
        (
            lambda: ditfastattn((1,), SHAPE, [["full", "half", "full"]], 5),
            r"^choices\[0\]: expected one of full, window, reuse, share, got 'half'$",
        ),
        (lambda: ditfastattn((1,), SHAPE, [["window"] * 3], 0), r"window: expected 1 token or more, got 0$"),
        (lambda: ditfastattn((1,), SHAPE, [["window"] * 3], 5), r"^steps\[0\]: .* reads its rest 5, which no step"),
        (lambda: l2c(TIMESTEPS, SHAPE, SCORES, 1.1), r"^threshold: expected 0 to 1, got 1\.1"),
        (lambda: l2c(TIMESTEPS, SHAPE, {}), r"^scores\[6\]: expected 6, one for each branch of the model, got none$"),
        (lambda: l2c(TIMESTEPS, SHAPE, SCORES | {4: [2.0] * 6}), r"^scores\[4\]: expected 0 to 1, got 2\.0$"),
        (lambda: delta_dit(TIMESTEPS, SHAPE, 1, 2, 1.5), r"^boundary: expected 0 to 1, a share of the run, got 1\.5$"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(make: Callable[[], Plan], problem: str) -> None:
    with pytest.raises(TableError, match=problem):
        make()
