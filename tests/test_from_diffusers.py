"""Samplers read off diffusers' schedulers against those schedulers, over whole trajectories of a toy model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from schedulers import Predict, scheduler_loop, with_scaled_eps
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.ops.operands import GuidanceArgs, StepIndex, Update
from ebcache_fast.ops.reference import step_on
from ebcache_fast.samplers import Sampler, make_sampler, sampler_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

# A DDPMScheduler takes its variances as 1 - a ratio of two float32: near 100 steps that alone adds up to 1e-5.
STEP_COUNTS = [1, 7, 20, 50]
SHAPE = (2, 3, 5, 5)
V = {"prediction_type": "v_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
COGVIDEOX = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}  # that of 2B


@dataclass(frozen=True)
class Case:
    """A scheduler's class and configuration."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)

    def scheduler(self, dtype: torch.dtype = torch.float32) -> Any:
        """The scheduler; one that only keeps its alphas in float32 computes in float64 once it is given them so."""
        made = getattr(diffusers, self.kind)(**self.config)
        if dtype == torch.float64:
            made.alphas_cumprod = made.alphas_cumprod.double()
            made.final_alpha_cumprod = torch.as_tensor(getattr(made, "final_alpha_cumprod", 1.0)).double()
        return made

    @property
    def learns_variance(self) -> bool:
        return self.config.get("variance_type") == "learned_range"


def ddpm(**config: object) -> Case:
    return Case("DDPMScheduler", {"clip_sample": False} | config)


def ddim(**config: object) -> Case:
    return Case("DDIMScheduler", {"clip_sample": False} | config)


dpm = partial(Case, "DPMSolverMultistepScheduler")
CASES = {
    "ddpm": ddpm(),
    "ddpm, the larger variance": ddpm(variance_type="fixed_large"),
    "ddpm, the logarithm": ddpm(variance_type="fixed_small_log"),
    "ddpm, learned variance": ddpm(variance_type="learned_range", timestep_spacing="linspace"),
    "ddpm, noise at the last step": ddpm(variance_type="learned_range", timestep_spacing="trailing"),
    "ddpm, v": ddpm(**V),
    "ddim": ddim(),
    "ddim, strides that miss the next step": ddim(timestep_spacing="linspace"),
    "ddim, an offset": ddim(steps_offset=1, set_alpha_to_one=False),
    "ddim, v from no data at all": ddim(**COGVIDEOX),
    "PixArt-Sigma's": dpm({"beta_start": 0.0001, "beta_end": 0.02, "solver_order": 2}),
    "heun": dpm({"solver_type": "heun"}),
    "first order": dpm({"solver_order": 1}),
    "leading": dpm({"timestep_spacing": "leading", "steps_offset": 1}),
    "trailing, v": dpm(V | {"timestep_spacing": "trailing"}),
    "v from nearly no data": dpm(V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    "to sigma_min": dpm({"final_sigmas_type": "sigma_min"}),
    "to sigma_min, Euler": dpm({"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    "to sigma_min, high order": dpm({"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    "a cosine schedule, clipped": dpm({"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    "sde": dpm(SDE),
    "sde, heun, v": dpm(SDE | V | {"solver_type": "heun"}),
    "cogvideox ddim": Case("CogVideoXDDIMScheduler", COGVIDEOX),
    "cogvideox ddim, 5B": Case("CogVideoXDDIMScheduler", COGVIDEOX | {"snr_shift_scale": 1.0}),
    "cogvideox dpm": Case("CogVideoXDPMScheduler", COGVIDEOX),
    "cogvideox dpm, as it comes": Case("CogVideoXDPMScheduler"),
}
IN_FLOAT64 = [name for name in CASES if name.startswith(("ddpm", "ddim", "cogvideox"))]  # the others round


def model(x: Tensor, t: int) -> Tensor:
    """A nonlinear mix of x and t with an output as large as eps and v are, and a variance output behind it."""
    mixed = x + 0.7 * x.roll(1, dims=1) - 0.4 * x.roll(2, dims=3)
    return torch.cat([torch.tanh(mixed - t / 500) + 0.2 * x.roll(1, dims=2), torch.tanh(mixed)], dim=1)


def draw(steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first latents, and the noise of each step."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(steps + 1, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return drawn[0], drawn[1:]


def ours(
    sampler: Sampler,
    x: Tensor,
    noise: Tensor,
    predict: Predict,
    b: float = 1.0,
    corrections: Sequence[tuple[float, float]] = (),
) -> Tensor:
    """The latents at the end of our own loop, whose steps are `reference.step_on`'s."""
    scaled, factor = sampler.scaling_eps(b, corrections)
    x, rows = x.clone(), torch.tensor(scaled.rows, dtype=x.dtype)
    memory = torch.zeros_like(x) if sampler.has_memory else None
    update = Update(rows, noise if sampler.draws_noise else None, memory)
    for i, t in enumerate(sampler.timesteps):
        out = predict(x, t)
        out[:, : x.shape[1]] *= factor
        at = StepIndex(torch.tensor([i], dtype=torch.int32), torch.zeros(len(x), dtype=torch.int32))
        step_on(x, out, GuidanceArgs(torch.ones(2), 0, x.shape[1], 1), at, update)
    return x


def error(one: Tensor, other: Tensor) -> float:
    assert one.dtype == other.dtype
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def predict_for(case: Case) -> Predict:
    """The model, with a variance output where the scheduler wants one."""
    return model if case.learns_variance else lambda x, t: model(x, t)[:, : x.shape[1]]


@pytest.mark.parametrize("steps", STEP_COUNTS)
@pytest.mark.parametrize("name", CASES)
def test_a_trajectory_equals_the_scheduler_s(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = CASES[name].scheduler()
    x, noise = draw(steps, torch.float32)
    predict = predict_for(CASES[name])
    sampler = sampler_of(scheduler, steps)
    assert error(ours(sampler, x, noise, predict), scheduler_loop(scheduler, x, noise, predict, monkeypatch)) < 1e-5
    assert sampler.timesteps == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("steps", [2, 7, 30])
@pytest.mark.parametrize("name", IN_FLOAT64)
def test_a_trajectory_in_float64(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = CASES[name].scheduler(torch.float64)
    x, noise = draw(steps, torch.float64)
    predict = predict_for(CASES[name])
    sampler = sampler_of(scheduler, steps)
    assert error(ours(sampler, x, noise, predict), scheduler_loop(scheduler, x, noise, predict, monkeypatch)) < 1e-10


@pytest.mark.parametrize(("b", "is_corrected"), [(0.9, False), (1.05, False), (1.0, True), (0.9, True)])
@pytest.mark.parametrize(
    "name", ["ddpm, v", "ddim", "PixArt-Sigma's", "trailing, v", "sde, heun, v", "cogvideox ddim", "cogvideox dpm"]
)
def test_eps_scaling_equals_the_formula_around_the_scheduler(
    name: str, b: float, is_corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, steps = CASES[name], 20
    exact = name in IN_FLOAT64
    dtype = torch.float64 if exact else torch.float32
    scheduler = case.scheduler(dtype)
    x, noise = draw(steps, dtype)
    sampler = sampler_of(scheduler, steps)
    pairs = [(1 + 0.1 / (i + 1), 0.01 * (i % 3 - 1)) for i in range(steps)] if is_corrected else []
    scaled = ours(sampler, x, noise, predict_for(case), b, pairs)
    at = dict(zip(sampler.timesteps, pairs, strict=False))
    around = scheduler_loop(scheduler, x, noise, with_scaled_eps(scheduler, predict_for(case), b, at), monkeypatch)
    assert error(scaled, around) < (1e-10 if exact else 1e-5)
    assert error(ours(sampler, x, noise, predict_for(case)), around) > 1e-3


def test_where_there_is_hardly_data_a_v_stays_unscaled() -> None:
    sampler = sampler_of(CASES["cogvideox ddim"].scheduler(), 50)
    scaled, factor = sampler.scaling_eps(0.9)
    same = [alpha_bar < 0.05**2 for alpha_bar in sampler.v_alpha_bar]
    assert factor == 1.0
    assert [one == other for one, other in zip(sampler.step_rows, scaled.step_rows, strict=True)] == same
    assert 0 < sum(same) < 50
    assert sampler.scaling_eps(1.0)[0] == sampler


def test_the_solver_by_name_is_pixart_sigma_s() -> None:
    for steps in (4, 20, 50):
        named, read = make_sampler("dpm-solver++", steps), sampler_of(CASES["PixArt-Sigma's"].scheduler(), steps)
        assert (named.name, named.timesteps) == (read.name, read.timesteps)
        torch.testing.assert_close(torch.tensor(named.rows), torch.tensor(read.rows), rtol=1e-4, atol=1e-4)


def test_the_scheduler_stays_as_it_is() -> None:
    scheduler = CASES["PixArt-Sigma's"].scheduler()
    scheduler.set_timesteps(7)
    before = scheduler.timesteps
    assert sampler_of(scheduler, 5).steps == 5
    assert scheduler.timesteps is before


def test_names() -> None:
    names = {"sde": "sde-dpm-solver++", "heun": "dpm-solver++", "ddim": "ddim", "ddpm": "ddpm"}
    names |= {"cogvideox ddim": "cogvideox-ddim", "cogvideox dpm": "cogvideox-dpm"}
    assert {name: sampler_of(CASES[name].scheduler(), 4).name for name in names} == names


REFUSED = {
    "another class": (Case("EulerDiscreteScheduler"), 10, "scheduler EulerDiscreteScheduler is unknown; use one of"),
    "clipping, DDIM": (Case("DDIMScheduler"), 10, r"clip_sample=True of DDIMScheduler .*config, clip_sample=False\)"),
    "clipping, DDPM": (Case("DDPMScheduler"), 10, "clip_sample=True"),
    "thresholding": (dpm({"thresholding": True}), 10, "thresholding=True"),
    "predicted data": (dpm({"prediction_type": "sample"}), 10, "prediction_type='sample'"),
    "predicted flow": (
        dpm({"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        10,
        "prediction_type='flow_prediction'",
    ),
    "flow sigmas": (dpm({"use_flow_sigmas": True}), 10, "use_flow_sigmas=True"),
    "Karras sigmas": (dpm({"use_karras_sigmas": True}), 10, "use_karras_sigmas=True"),
    "exponential sigmas": (dpm({"use_exponential_sigmas": True}), 10, "use_exponential_sigmas=True"),
    "lambdas": (dpm({"use_lu_lambdas": True}), 10, "use_lu_lambdas=True"),
    "shifts": (dpm({"use_dynamic_shifting": True}), 10, "use_dynamic_shifting=True"),
    "third order": (dpm({"solver_order": 3}), 10, "solver_order=3"),
    "a solver of eps": (
        dpm({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        10,
        "algorithm_type='dpmsolver'",
    ),
    "a variance nobody reads": (dpm({"variance_type": "learned_range"}), 10, "variance_type='learned_range'"),
    "a learned variance": (ddpm(variance_type="learned"), 10, "variance_type='learned'"),
    "a NaN of a variance": (ddpm(variance_type="fixed_large_log"), 10, "variance_type='fixed_large_log'"),
    "no steps": (ddim(), 0, r"steps=0 is outside \[1, 1000\]"),
    "too many steps": (ddim(), 1001, r"steps=1001 is outside \[1, 1000\]"),
    "repeated timesteps": (dpm(), 1000, "repeats timesteps at steps=1000; use fewer"),
    "eps of no data": (ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 10, "alpha_bar=0"),
    "a timestep too high": (ddim(steps_offset=200), 10, r"runs from timestep 1100 to 200, outside \[0, 999\]"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_linear_step_can_t_do_is_refused(name: str) -> None:
    case, steps, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        sampler_of(case.scheduler(), steps)
