"""Methods side by side: the same noise, their turns, their costs and times, and the spread of their scores."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, BRANCHES, MLP, NO
from hypothesis import given
from hypothesis import strategies as st
from tiny import CLASSES, tiny_dit
from torch import Tensor

from ebcache_fast.apps import compare
from ebcache_fast.apps.compare import Method, Run, equal_cost_methods, judge_runs, run_methods
from ebcache_fast.apps.quality import Features, Judge, Reference, paired_error, recognition, score
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan, StepType, layered
from ebcache_fast.samplers.schedule import respaced_timesteps
from ebcache_fast.sampling import sample

MODEL = tiny_dit(dtype=torch.float32)
SHAPE = as_denoiser(MODEL).shape


def plan(*step_types: StepType) -> Plan:
    return Plan.from_types(step_types, respaced_timesteps(1000, len(step_types)), layered(SHAPE.depth, BRANCHES))


UNCACHED = plan(NO, NO, NO)
CACHED = plan(NO, ATTN_MLP, NO)


# ----------------------------------------------------------------------------------------------- run_methods


def test_all_methods_get_the_same_noise() -> None:
    labels = torch.tensor([3, 0, 1, 4, 2])
    methods = [Method("a", UNCACHED), Method("b", CACHED), Method("again", UNCACHED), Method("ddim", UNCACHED, "ddim")]
    runs = run_methods(MODEL, methods, labels, cfg_scale=2.0, seed=7, batch_size=2)
    assert [len(run.images) for run in runs] == [5] * 4
    assert [len(run.seconds) for run in runs] == [3] * 4
    assert torch.equal(runs[0].images, runs[2].images)
    for method, run in zip(methods, runs, strict=True):
        alone = sample(MODEL, labels, table=method.plan, sampler=method.sampler, cfg_scale=2.0, seed=7, batch_size=2)
        assert torch.equal(run.images, alone)
    assert not torch.equal(runs[0].images, runs[1].images)
    assert not torch.equal(runs[0].images, runs[3].images)


def test_seed_and_guidance_reach_every_method() -> None:
    labels = torch.tensor([3, 0])
    (base,) = run_methods(MODEL, [Method("a", UNCACHED)], labels)
    for change in ({"seed": 1}, {"cfg_scale": 3.0}, {"cfg_scale": 3.0, "guided_channels": 1}):
        (other,) = run_methods(MODEL, [Method("a", UNCACHED)], labels, **change)
        assert not torch.equal(base.images, other.images)


def test_methods_take_turns_within_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def recorded(model: object, labels: Tensor, **given: object) -> Tensor:
        calls.append((labels.tolist(), given.get("table"), given.get("steps"), given.get("first_index")))
        return torch.zeros(len(labels), 4, 8, 8)

    monkeypatch.setattr(compare, "sample", recorded)
    methods = [Method("a", UNCACHED), Method("b", CACHED)]
    run_methods(MODEL, methods, torch.tensor([0, 1, 2, 3, 4]), batch_size=2)
    warm_up, *timed = calls
    assert warm_up == ([0, 1], None, 2, None)
    assert timed == [
        ([0, 1], UNCACHED, None, 0),
        ([0, 1], CACHED, None, 0),
        ([2, 3], UNCACHED, None, 2),
        ([2, 3], CACHED, None, 2),
        ([4], UNCACHED, None, 4),
        ([4], CACHED, None, 4),
    ]


def test_each_batch_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by 1 s at the first look, 2 s at the second, and so on: two looks a batch and method."""
    ticks = (float(n * (n + 1) // 2) for n in count())
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(compare, "sample", lambda model, labels, **given: torch.zeros(len(labels), 4, 8, 8))
    runs = run_methods(MODEL, [Method("a", UNCACHED), Method("b", CACHED)], torch.zeros(4), batch_size=2)
    assert [run.seconds for run in runs] == [(1.0, 5.0), (3.0, 7.0)]


def test_progress_counts_every_sample_of_every_step() -> None:
    advanced: list[int] = []
    methods = [Method("a", UNCACHED), Method("b", plan(NO, MLP))]
    run_methods(MODEL, methods, torch.tensor([0, 1, 2]), batch_size=2, on_step=advanced.append)
    assert sum(advanced) == 3 * (3 + 2)


def test_too_few_samples_to_judge_by_or_to_spread() -> None:
    for judged, samples in ((Judge(judge, REFERENCE), 31), (None, 1)):
        with pytest.raises(InputError, match=f"samples={samples} is below"):
            compare.measure(MODEL, [Method("a", UNCACHED)], [0] * samples, judged)


def test_no_method_is_an_error() -> None:
    with pytest.raises(InputError, match="no method was given; name at least one"):
        run_methods(MODEL, [], torch.tensor([0]))


# ------------------------------------------------------------------------------------------------ judge_runs


def judge(images: Tensor) -> Features:
    """Features that depend on the pictures and nothing else."""
    values = images.double().flatten(1)
    return Features(
        semantic=values[:, :3],
        texture=values[:, 3:5].abs(),
        logits=values[:, 5 : 5 + CLASSES],
        contrast=values.std(dim=1),
    )


def pictures(seed: int, n: int = 21) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


REFERENCE = Reference.from_features(judge(pictures(99, 40)), keep=20)
LABELS = torch.arange(21) % CLASSES
SHORTER = dataclasses.replace(plan(NO, NO), eps_scale=0.9)
METHODS = [Method("base", UNCACHED), Method("cached", CACHED), Method("shorter", SHORTER)]
RUNS = [
    Run(pictures(0), (8.0, 3.0, 1.0)),
    Run(pictures(1), (2.0, 3.0, 0.5)),
    Run(pictures(0) + 0.1, (16.0, 1.0, 4.0)),
]


def results() -> list[compare.Result]:
    return judge_runs(MODEL, METHODS, RUNS, LABELS, Judge(judge, REFERENCE), groups=4)


def test_costs_are_those_of_the_plans() -> None:
    for result, method in zip(results(), METHODS, strict=True):
        assert result.name == method.name
        assert result.macs == method.plan.macs(SHAPE)
        assert result.mac_limit == pytest.approx(UNCACHED.macs(SHAPE) / result.macs)
        assert result.eps_scale == method.plan.eps_scale
    assert results()[0].mac_limit == 1
    assert results()[1].mac_limit > 1
    assert results()[1].step_types == ("NO_CACHE", "ATTN_MLP", "NO_CACHE")


def test_speedup_is_the_median_of_the_batches_ratios() -> None:
    base, cached, slower = results()
    assert (base.seconds, base.speedup) == (12.0, 1.0)
    # Ratios 4, 1, 2: their median is 2, while the totals' ratio is 12 / 5.5.
    assert (cached.seconds, cached.speedup) == (5.5, 2.0)
    assert (cached.spread["speedup_low"], cached.spread["speedup_high"]) == (1.0, 4.0)
    assert slower.speedup == 0.5  # of 0.5, 3 and 0.25


def test_errors_are_against_the_first_method() -> None:
    base, cached, shifted = results()
    assert base.paired_error == 0
    for result, run in ((cached, RUNS[1]), (shifted, RUNS[2])):
        errors = paired_error(run.images, RUNS[0].images).tolist()
        assert result.paired_error == pytest.approx(statistics.fmean(errors))
        assert result.spread["paired_error"] == pytest.approx(statistics.stdev(errors) / math.sqrt(21))
    assert shifted.paired_error < cached.paired_error


def test_scores_are_those_of_all_samples() -> None:
    for result, run in zip(results(), RUNS, strict=True):
        assert result.scores == score(judge(run.images), LABELS, REFERENCE)
        assert result.scores.n == 21


def test_every_sample_s_own_figures_are_kept() -> None:
    for result, run in zip(results(), RUNS, strict=True):
        features = judge(run.images)
        assert result.per_sample == {
            "paired_error": tuple(paired_error(run.images, RUNS[0].images).tolist()),
            "recognised": tuple(recognition(features.logits, LABELS).tolist()),
            "contrast": tuple(features.contrast.tolist()),
        }
        assert result.batch_seconds == run.seconds


def test_without_a_judge_there_are_costs_times_and_errors() -> None:
    for alone, judged in zip(judge_runs(MODEL, METHODS, RUNS, LABELS), results(), strict=True):
        assert alone.scores is None
        assert (alone.macs, alone.speedup, alone.paired_error) == (judged.macs, judged.speedup, judged.paired_error)
        assert alone.per_sample == {"paired_error": judged.per_sample["paired_error"]}
        assert alone.spread == {name: judged.spread[name] for name in ("speedup_low", "speedup_high", "paired_error")}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (("ddpm", UNCACHED), ("same", "other noise")),
        (("ddpm", CACHED), ("same", "other noise")),
        (("ddpm", SHORTER), ("other noise", "other noise")),
        (("ddim", UNCACHED), ("other noise", "same")),
        (("ddim", SHORTER), ("other noise", "other steps")),
        (("dpm-solver++", UNCACHED), ("other noise", "other steps")),
    ],
)
def test_whose_noise_is_the_first_method_s(other: tuple[str, Plan], expected: tuple[str, str]) -> None:
    """DDPM draws noise at every step, the two others none but the first."""
    method = Method("other", other[1], other[0])
    for first, noise in zip(("ddpm", "ddim"), expected, strict=True):
        assert compare.noise_beside(method, Method("first", UNCACHED, first)) == noise


def test_samples_that_are_no_numbers_name_their_method() -> None:
    broken = Run(RUNS[1].images.clone().index_fill_(0, torch.tensor([3]), math.nan), RUNS[1].seconds)
    with pytest.raises(InputError, match=r"method 'cached': images has 256 non-finite values.*; leave it out"):
        judge_runs(MODEL, METHODS, [RUNS[0], broken, RUNS[2]], LABELS)


def test_spread_is_the_jackknife_over_groups() -> None:
    """Directly: leave out every fourth sample, starting anew each time; (g - 1) / g of the squared deviations."""
    for result, run in zip(results(), RUNS, strict=True):
        left_out = []
        for g in range(4):
            kept = [i for i in range(21) if i % 4 != g]
            left_out.append(score(judge(run.images[kept]), LABELS[kept], REFERENCE))
        for name in ("fd_semantic", "fd_texture", "recognised", "contrast", "precision", "recall"):
            values = [getattr(scores, name) for scores in left_out]
            mean = sum(values) / 4
            expected = math.sqrt(3 / 4 * sum((value - mean) ** 2 for value in values))
            assert result.spread[name] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert results()[1].spread["fd_semantic"] > 0


def test_a_mixed_step_has_a_name() -> None:
    mixed = dataclasses.replace(CACHED.steps[1], rules=(*CACHED.steps[1].rules[:2], *CACHED.steps[0].rules[2:]))
    odd = Plan((CACHED.steps[0], mixed, CACHED.steps[0]), CACHED.timesteps)
    (result,) = judge_runs(MODEL, [Method("odd", odd)], RUNS[:1], LABELS)
    assert result.step_types == ("NO_CACHE", "MIXED", "NO_CACHE")


# ---------------------------------------------------------------------------------------- equal_cost_methods


def cost(step_types: Sequence[StepType]) -> int:
    return plan(*step_types).macs(SHAPE)


FULL_STEP = cost([NO])
SAVING = FULL_STEP * 2 - cost([NO, ATTN_MLP])  # what one reused step saves

cached_plans = st.lists(st.sampled_from((NO, ATTENTION, ATTN_MLP, MLP)), min_size=5, max_size=60).map(
    lambda types: plan(NO, *types)
)


@given(cached_plans)
def test_rivals_cost_as_much_as_the_cached_plan(cached: Plan) -> None:
    _, own, fora, fewer = equal_cost_methods(SHAPE, [("mine", cached)], "ddim")
    target = own.plan.macs(SHAPE)
    # As near as whole steps can come.
    cheapest = cost([NO, *[ATTN_MLP] * (len(cached) - 2), NO])
    assert abs(fora.plan.macs(SHAPE) - max(target, cheapest)) <= SAVING / 2 + 1
    assert abs(fewer.plan.macs(SHAPE) - target) <= FULL_STEP / 2 + 1
    assert set(fora.plan.counts()) <= {NO, ATTN_MLP}
    assert set(fewer.plan.counts()) == {NO}


def test_the_order_of_an_equal_cost_comparison() -> None:
    first, second = plan(NO, *[ATTN_MLP, NO] * 5), plan(NO, *[ATTN_MLP] * 9, NO)
    methods = equal_cost_methods(SHAPE, [("mine", first), ("yours", second)], "ddim")
    names = [method.name for method in methods]
    assert names[:4] == ["No cache, 11 steps", "mine", "FORA at its cost", f"{len(methods[3].plan)} steps"]
    assert names[4:] == ["yours", "FORA at its cost", f"{len(methods[6].plan)} steps"]
    assert methods[0].plan == plan(*[NO] * 11)
    assert (methods[1].plan, methods[4].plan) == (first, second)
    assert methods[3].plan.timesteps == respaced_timesteps(1000, len(methods[3].plan))
    assert {method.sampler for method in methods} == {"ddim"}
