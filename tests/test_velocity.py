"""eps scaling of a model that predicts velocity: CogVideoX, whose noise is but a part of what it predicts."""

from typing import Any

import pytest
import torch
from diffusers_kinds import (
    COG_2B,
    COG_5B,
    COG_IMAGE,
    COGS,
    STEPS,
    Kind,
    drive,
    table_of,
    timesteps,
    uncached,
)
from diffusers_oracle import alpha_bar, drive_replaying, replaying, scaled_v
from diffusers_tiny import cogvideox_scheduler
from tiny import relative_error

from ebcache_fast import disable, enable, stats
from ebcache_fast.dropin.output_change import OutputChange
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


only_2b = pytest.mark.parametrize("kind", [COG_2B], ids=str)
both_positions = pytest.mark.parametrize("kind", [COG_2B, COG_5B], ids=str)


@pytest.mark.parametrize(("kind", "guidance_scale"), [(COG_2B, 1.0), *((kind, 4.0) for kind in COGS)], ids=str)
def test_noise_is_scaled_once(kind: Kind, pipe: Any, guidance_scale: float) -> None:
    replayed = kind.draw(replaying(pipe, eps_scale=0.8), guidance_scale=guidance_scale)
    assert relative_error(kind.draw(replaying(pipe), guidance_scale=guidance_scale), replayed) > 1e-3
    for named in (dict(eps_scale=0.8), dict(eps_scale=0.8, in_order=True)):
        enable(pipe, table_of(pipe), **named)
        assert relative_error(kind.draw(pipe, guidance_scale=guidance_scale), replayed) < 1e-5


@pytest.mark.parametrize("kind", [COG_2B, COG_5B, COG_IMAGE], ids=str)
def test_v_is_scaled_by_the_schedulers_alphas_and_not_near_pure_noise(kind: Kind, pipe: Any) -> None:
    pipe.scheduler = cogvideox_scheduler(type(pipe.scheduler).__name__, snr_shift_scale=2.0)
    ts, call = timesteps(pipe), kind.call(pipe)
    whole = drive(pipe.transformer, call, ts)
    xs = [torch.randn(call["hidden_states"].shape, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]
    enable(pipe, uncached(pipe), eps_scale=0.9)
    scaled = drive(pipe.transformer, call, ts)
    for i, t in enumerate(ts):
        squared = alpha_bar(pipe, torch.tensor([t]))
        expected = scaled_v(whole[i], xs[i][:, :, :4], squared, 0.9)
        assert relative_error(scaled[i], expected) < 1e-5
        assert (relative_error(expected, whole[i]) == 0) == (squared < 0.05**2)
    assert alpha_bar(pipe, torch.tensor([ts[0]])) < 0.05**2


@only_2b
def test_a_timestep_that_is_not_in_the_table_is_scaled_too(kind: Kind, pipe: Any) -> None:
    replayed = kind.draw(replaying(pipe, eps_scale=0.9), steps=3)
    enable(pipe, table_of(pipe), eps_scale=0.9)
    assert relative_error(kind.draw(pipe, steps=3), replayed) < 1e-5
    assert stats(pipe).refreshed == {"a timestep is not in the plan": 2}


@only_2b
def test_the_timesteps_that_can_be_scaled_are_the_schedules(kind: Kind, pipe: Any) -> None:
    plan = table_of(pipe, eps_scale=0.9).plan(as_denoiser(pipe.transformer).shape)
    scaling = OutputChange.of(pipe, pipe.transformer, plan)
    assert scaling is not None
    v, x = torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(0))
    for t in (0, 499, 999):
        scaling.apply(out := v.clone(), x, t, is_planned=True)
        assert relative_error(out, scaled_v(v, x, alpha_bar(pipe, torch.tensor([t])), 0.9)) < 1e-5
    for t in (-1, 1000, 0.5):
        with pytest.raises(InputError, match=rf"^t={t} is none of the scheduler's 1000 .* eps_scale=0\.9 .*; use .*"):
            scaling.apply(v, x, t, is_planned=False)


@only_2b
def test_a_scheduler_that_predicts_eps(kind: Kind, pipe: Any) -> None:
    pipe.scheduler.register_to_config(prediction_type="epsilon", rescale_betas_zero_snr=False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    replayed = kind.draw(replaying(pipe, eps_scale=0.9))
    enable(pipe, table_of(pipe), eps_scale=0.9)
    assert relative_error(kind.draw(pipe), replayed) < 1e-5


@only_2b
def test_a_scheduler_that_predicts_what_nobody_scales(kind: Kind, pipe: Any) -> None:
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(InputError, match=r"eps_scale=0\.9 .* predicts, 'sample'; .* leave it at 1"):
        enable(pipe, table_of(pipe), eps_scale=0.9)
    enable(pipe, table_of(pipe))


@only_2b
def test_another_scheduler_after_enabling(kind: Kind, pipe: Any) -> None:
    """The alphas are those of the scheduler that the pipeline had when it was enabled last."""
    enable(pipe, table_of(pipe), eps_scale=0.9)
    pipe.scheduler = cogvideox_scheduler(snr_shift_scale=1.0)
    ours = kind.draw(enable(pipe, table_of(pipe), eps_scale=0.9))
    assert relative_error(ours, kind.draw(replaying(disable(pipe), eps_scale=0.9))) < 1e-5


@both_positions
def test_the_module_alone_has_no_alphas(kind: Kind, pipe: Any) -> None:
    model = pipe.transformer
    for table, named in (
        (table_of(pipe), dict(eps_scale=0.9)),
        (table_of(pipe, eps_scale=0.9), {}),
        (uncached(pipe), dict(eps_scale=1.1, allow_amplify=True)),
    ):
        with pytest.raises(InputError, match=r"(?s)(pipeline|scheduler|alphas)") as refused:
            enable(model, table, **named)
        assert "\n" not in str(refused.value)
        assert "_cached_forward" not in vars(model)
    enable(model, table_of(pipe, eps_scale=0.9), eps_scale=1.0)
    call = kind.call(disable(pipe))
    enable(model, table_of(pipe))
    replayed = drive_replaying(disable(pipe), call, timesteps(pipe))
    enable(model, table_of(pipe))
    assert max(map(relative_error, drive(model, call, timesteps(pipe)), replayed)) < 1e-5
