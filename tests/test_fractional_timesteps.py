"""Schedulers whose timesteps are fractions, or come again: what is cached, what is computed, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from constants import NO
from diffusers_kinds import COG_2B, DIT, SIGMA, TYPES, Kind, ask, drive, table_of, timesteps
from diffusers_oracle import drive_replaying, replaying
from dropin import LABELS, fresh_model, latents
from tiny import relative_error
from torch import Tensor

from ebcache_fast import CacheTable, enable, enabled, sample, stats
from ebcache_fast.apps.method_spec import Setting, parse_method
from ebcache_fast.errors import InputError, TableError, TrajectoryError
from ebcache_fast.models import as_denoiser

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy's, in diffusers

AS_TYPES = {kind.name: TYPES.count(kind) for kind in dict.fromkeys(TYPES)}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler, trailing": lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
}
both_kinds = pytest.mark.parametrize("kind", [DIT, SIGMA], ids=str)


def with_scheduler(kind: Kind, scheduler: Any) -> Any:
    pipe = kind.pipeline()
    pipe.scheduler = scheduler
    return pipe


def drawn(kind: Kind, pipe: Any) -> Tensor:
    """What it returns; DiT's pipeline lets its scheduler draw from the global generator."""
    torch.manual_seed(0)
    return kind.draw(pipe)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@both_kinds
def test_a_pipeline_is_cached_by_its_very_timesteps(kind: Kind, name: str, in_order: bool, tmp_path: Path) -> None:
    pipe = with_scheduler(kind, SCHEDULERS[name]())
    expected = drawn(kind, replaying(pipe))
    assert relative_error(expected, drawn(kind, pipe)) > 1e-4
    table_of(pipe).save(tmp_path / "t.json")
    enable(pipe, CacheTable.load(tmp_path / "t.json"), in_order=in_order)
    assert relative_error(drawn(kind, pipe), expected) < 1e-5
    done = stats(pipe)
    assert not done.refreshed | done.originals
    assert done.steps == AS_TYPES


def test_a_scheduler_of_two_calls_a_step_whose_timesteps_differ_is_cached_too() -> None:
    pipe = with_scheduler(SIGMA, diffusers.KDPM2DiscreteScheduler())
    table = CacheTable(timesteps(pipe, 3), TYPES)  # 3 steps, between which lie 2
    expected = SIGMA.draw(replaying(pipe, dict(zip(table.timesteps, TYPES, strict=True))), steps=3)
    assert relative_error(SIGMA.draw(enable(pipe, table), steps=3), expected) < 1e-5
    assert stats(pipe).steps == AS_TYPES


@both_kinds
@pytest.mark.parametrize("in_order", [False, True])
def test_a_loop_of_flow_matching_is_cached(kind: Kind, in_order: bool) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(len(TYPES))
    ts, pipe = scheduler.timesteps.tolist(), kind.pipeline()
    call = kind.call(pipe)
    expected = drive_replaying(pipe, call, ts)
    enable(pipe, CacheTable(scheduler.timesteps, TYPES), in_order=in_order)
    found = drive(pipe.transformer, call, ts)
    assert max(map(relative_error, found, expected)) < 1e-5
    assert stats(pipe).steps == AS_TYPES


def test_a_promised_order_is_held_against_the_last_bit() -> None:
    model, y = fresh_model(), LABELS
    x, ts = latents(model)[0], torch.tensor([799.2, 400.6, 0.3])
    enable(model, CacheTable(ts, [0, 2, 2]), in_order=True)
    with torch.no_grad():
        for step in (0, 1, 2):
            assert model(x, ts[step : step + 1], y).isfinite().all()
        model(x, ts[:1], y)
        assert model(x, torch.nextafter(ts[1:2], ts[:1]), y).isnan().all()
        with pytest.raises(TrajectoryError):
            model(x, ts[2:], y)


@torch.no_grad()
def test_a_near_miss_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = fresh_model()
    x, given = latents(model)[0], torch.tensor([799.2])  # float32: 799.2000122...
    enable(model, CacheTable([799.2, 0], [0, 2]))
    model(x, given, LABELS)
    assert "799.2000122070312 where 799.2 is" in caplog.text
    with (
        enabled(model, CacheTable([799.2, 0], [0, 2]), strict=True),
        pytest.raises(TrajectoryError, match=r"not in the plan, 799\.2000122070312 where 799\.2 is"),
    ):
        model(x, given, LABELS)


@torch.no_grad()
def test_what_half_precision_makes_of_a_timestep_is_no_step_of_the_table() -> None:
    model = fresh_model()
    x, ts = latents(model)[0], (997.0, 799.2, 400.6)
    halves = torch.tensor(ts, dtype=torch.bfloat16)
    own = [model(x, t[None], LABELS) for t in halves]
    with enabled(model, CacheTable(ts, [0, 2, 2])):
        found = [model(x, t[None], LABELS) for t in halves]
        assert sum(stats(model).refreshed.values()) == 3
    assert max(map(relative_error, found, own)) < 1e-5


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_timesteps_that_come_again_are_refused_with_the_remedy(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(6)
    ts = scheduler.timesteps.tolist()
    again = next(t for i, t in enumerate(ts) if t in ts[:i])
    for ask_for in (
        lambda: CacheTable(ts, [0] * len(ts)),
        lambda: CacheTable(range(len(ts))[::-1], [0] * len(ts)).retime(ts),
    ):
        with pytest.raises(TableError, match=rf"got {again:g}[0-9]*; .*use another one, .*distinct timesteps$"):
            ask_for()


def test_a_table_over_the_distinct_timesteps_of_heuns_is_right() -> None:
    pipe = with_scheduler(SIGMA, diffusers.HeunDiscreteScheduler())
    plain = SIGMA.draw(pipe, steps=3)
    enable(pipe, CacheTable(dict.fromkeys(timesteps(pipe, 3)), [NO] * 3))
    assert relative_error(SIGMA.draw(pipe, steps=3), plain) < 1e-5


def test_samplers_by_name_have_no_noise_level_between_two_timesteps() -> None:
    model = fresh_model()
    table = CacheTable([999, 499.5], [0, 2])
    for ask_for in (
        lambda: sample(model, [1], table=table),
        lambda: sample(model, [1], table=table.plan(as_denoiser(model).shape)),
    ):
        with pytest.raises(InputError, match=r"^timestep 499\.5 is not a whole number; .*ebcache_fast\.enable"):
            ask_for()


def test_a_comparison_by_command_refuses_such_a_table(tmp_path: Path) -> None:
    CacheTable([999, 499.5], [0, 2]).save(tmp_path / "t.json")
    setting = Setting(as_denoiser(fresh_model()).shape, 2, "ddim")
    with pytest.raises(InputError, match=r"^method .table:.*t\.json.: timestep 499\.5 is not a whole number"):
        parse_method(f"table:{tmp_path / 't.json'}", setting)


def test_noise_within_velocity_is_scaled_at_the_schedules_timesteps_alone() -> None:
    pipe = COG_2B.pipeline()
    with pytest.raises(InputError, match=r"^t=499\.5 is none of the scheduler's 1000 timesteps, .* or eps_scale=1$"):
        enable(pipe, CacheTable([999, 499.5], [0, 2]), eps_scale=0.9)
    enable(pipe, CacheTable([999, 499.5], [0, 2]))
    assert ask(pipe.transformer, COG_2B.call(pipe), 999).isfinite().all()


@both_kinds
def test_what_flow_matching_predicts_is_not_scaled_as_noise(kind: Kind) -> None:
    pipe = with_scheduler(kind, diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(InputError, match=r"^eps_scale=0\.9 needs to know the noise .*'flow'.* leave it at 1$"):
        enable(pipe, table_of(pipe), eps_scale=0.9)
    enable(pipe, table_of(pipe))
