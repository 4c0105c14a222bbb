"""Linear corrections of predicted noise: in our own loop, in somebody else's, and in a table's file."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import relative_error, tiny_dit
from torch import Tensor

from ebcache_fast import enable, enabled, sample
from ebcache_fast.errors import InputError, TableError
from ebcache_fast.models import as_denoiser
from ebcache_fast.ops.update import remember, sampler_update
from ebcache_fast.plan import Correction, Plan, StepType
from ebcache_fast.plan.table import CacheTable, SamplerSpec
from ebcache_fast.samplers import make_sampler, trajectory_noise

STEPS, B = 6, 0.9
MODEL = tiny_dit(4)
SHAPE = as_denoiser(MODEL).shape
PAIRS = tuple(Correction(1 + 0.1 * (-1) ** i / (i + 1), 0.02 * (i - 2)) for i in range(STEPS))
LABELS = torch.tensor([0, 3])
TYPES = [StepType.NO_CACHE, StepType.ATTN_MLP, *[StepType.NO_CACHE] * (STEPS - 2)]


def plan_of(name: str = "ddim", corrections: tuple[Correction, ...] = PAIRS, b: float = B) -> Plan:
    steps = Plan.from_types(TYPES, range(STEPS)[::-1], SHAPE.sites).steps
    return Plan(steps, make_sampler(name, STEPS).timesteps, b, corrections)


@torch.no_grad()
def by_hand(plan: Plan, name: str) -> Tensor:
    """The loop written out: each step's noise is scaled, then corrected, then given to the sampler."""
    sampler = make_sampler(name, STEPS)
    noise = trajectory_noise(0, range(2), STEPS, (4, 8, 8), torch.float64)
    x, previous = noise[0], torch.zeros_like(noise[0]) if sampler.has_memory else None
    with enabled(MODEL, Plan(plan.steps, plan.timesteps)):
        for t, (on_eps, on_x), row, drawn in zip(
            plan.timesteps, plan.corrections, sampler.rows, noise[1:], strict=True
        ):
            eps, variance = MODEL(x, torch.full((2,), t), LABELS).chunk(2, dim=1)
            eps = on_eps * plan.eps_scale * eps + on_x * x
            kept = None if previous is None else remember(x, eps, row)
            x = sampler_update(x, eps, variance, drawn if sampler.draws_noise else None, row, previous)
            previous = kept
    return x


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++"])
def test_our_own_loop_takes_them_into_the_samplers_coefficients(name: str) -> None:
    ours = sample(MODEL, LABELS, table=plan_of(name), sampler=name, cfg_scale=1.0)
    assert relative_error(ours, by_hand(plan_of(name), name)) < 1e-12
    assert relative_error(ours, by_hand(plan_of(name, (Correction(),) * STEPS), name)) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_somebody_elses_loop_gets_corrected_outputs(guided: bool, in_order: bool) -> None:
    """Noise is corrected, variance is not, and neither is a step that is not in the plan."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 5]) if guided else LABELS
    x = x[:1].repeat(2, 1, 1, 1) if guided else x

    def call(t: float) -> Tensor:
        moment = torch.full((2,), t)
        out: Tensor = MODEL.forward_with_cfg(x, moment, labels, 1.5) if guided else MODEL(x, moment, labels)
        return out

    with enabled(MODEL, plan_of(corrections=(), b=1.0)):
        plain = [call(t) for t in plan_of().timesteps]
    with enabled(MODEL, plan_of(), in_order=in_order):
        corrected = [call(t) for t in plan_of().timesteps]
    for before, after, (on_eps, on_x) in zip(plain, corrected, PAIRS, strict=True):
        assert relative_error(after[:, :4], on_eps * B * before[:, :4] + on_x * x) < 1e-12
        assert torch.equal(after[:, 4:], before[:, 4:])
    with enabled(MODEL, plan_of()):
        unplanned = call(plan_of().timesteps[1] + 1)
    eps = call(plan_of().timesteps[1] + 1)[:, :4]
    assert relative_error(unplanned[:, :4], B * eps) < 1e-12


def test_a_velocity_needs_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebcache_fast.models.facebook_dit.DiTDenoiser.prediction_type", "v_prediction")
    with pytest.raises(InputError, match=r"^corrections need to know the noise in what DiT predicts, .* plan without$"):
        enable(MODEL, plan_of(b=1.0))


SPEC = SamplerSpec(name="ddim", steps=STEPS, train_steps=1000)


def test_a_table_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    CacheTable.from_plan(plan_of(), sampler=SPEC).save(path)
    table = CacheTable.load(path)
    assert table.plan(SHAPE) == plan_of()
    assert table == CacheTable.from_plan(plan_of(), sampler=SPEC)
    assert json.loads(path.read_text())["corrections"] == [list(pair) for pair in PAIRS]
    assert "corrections" not in CacheTable.from_plan(plan_of(corrections=())).document()
    ours = sample(MODEL, LABELS, table=table, cfg_scale=1.0)
    assert relative_error(ours, by_hand(plan_of(), "ddim")) < 1e-12


def test_a_table_that_is_moved_leaves_them() -> None:
    table = CacheTable.from_plan(plan_of(), sampler=SPEC)
    assert table.retime(table.timesteps, SPEC) == table
    for timesteps in ([t + 1 for t in reversed(range(STEPS))], range(9)[::-1]):
        moved = table.retime(timesteps)
        assert (moved.corrections, len(moved)) == ((), len(timesteps))


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (PAIRS[1:], r"^corrections: expected 6, one per timestep, or none, got 5$"),
        ([(1, 0, 0)] * STEPS, r"^corrections: expected a pair of finite numbers, .* got \[\(1, 0, 0\)"),
        ([("1", 0)] * STEPS, r"^corrections: expected a pair of finite numbers"),
        ([(True, 0)] * STEPS, r"^corrections: expected a pair of finite numbers"),
        (3, r"^corrections: expected a pair of finite numbers, .* got 3$"),
        ([*PAIRS[1:], (0, 0)], r"^corrections\[5\]: expected finite numbers, on_eps above 0, got \(0\.0, 0\.0\); "),
        ([(1, float("nan")), *PAIRS[1:]], r"^corrections\[0\]: expected finite numbers"),
        ([(float("inf"), 0), *PAIRS[1:]], r"^corrections\[0\]: expected finite numbers"),
    ],
)
def test_bad_input(pairs: object, problem: str) -> None:
    table = CacheTable.from_plan(plan_of())
    for make in (plan_of, partial(replace, table)):
        with pytest.raises(TableError, match=problem):
            make(corrections=pairs)  # type: ignore[operator]


def test_types_alone_have_none() -> None:
    with pytest.raises(TableError, match=r"^corrections: expected step_plans with them; CacheTable\.from_plan"):
        CacheTable(range(STEPS)[::-1], TYPES, corrections=PAIRS)


def test_a_file_with_wrong_ones_is_refused(tmp_path: Path) -> None:
    document = json.loads(json.dumps(CacheTable.from_plan(plan_of()).document()))
    for wrong, problem in (
        ([[1.0, 0.0]], r"corrections: expected 6, "),
        ([[1.0]] * STEPS, r"corrections\[0\]"),
        ([[1.0, "x"]] * STEPS, r"corrections\[0\]\[1\]: expected .*number, got 'x'"),
        ([[1.0, True]] * STEPS, r"corrections\[0\]\[1\]: expected .*number, got True"),
        ({}, r"corrections: expected "),
    ):
        with pytest.raises(TableError, match=problem):
            CacheTable.from_document({**document, "corrections": wrong})
