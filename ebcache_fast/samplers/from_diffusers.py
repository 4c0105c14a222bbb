"""The sampler that a diffusers scheduler is, read off the scheduler: its noise levels, its timesteps, its settings."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch

from ebcache_fast.errors import InputError
from ebcache_fast.samplers.coefficients import Sampler
from ebcache_fast.samplers.ddim import ddim_form
from ebcache_fast.samplers.ddpm import posterior_mean
from ebcache_fast.samplers.dpm_solver import heun, midpoint
from ebcache_fast.samplers.x0_form import Array, Prediction, X0Form

_LEAST_VARIANCE = 1e-20  # that a DDPMScheduler takes the logarithm of


def sampler_of(scheduler: Any, steps: int) -> Sampler:
    """The sampler that does what a diffusers scheduler does in `steps` steps; the scheduler stays as it is.

    Known are DDPMScheduler, DDIMScheduler (without eta), DPMSolverMultistepScheduler, CogVideoXDDIMScheduler and
    CogVideoXDPMScheduler, for models that predict eps or v. The last two never clip, whatever their clip_sample says.
    Raises InputError for another class, for a setting that our loop can't follow, and for steps that the scheduler
    can't spread over distinct timesteps; the message says which, and what to do.
    """
    name = type(scheduler).__name__
    if name not in _READERS:
        raise InputError(f"scheduler {name} is unknown; use one of {', '.join(_READERS)}")
    reader = _READERS[name]
    for setting, allowed in {**_COMMON, **reader.settings}.items():
        value = scheduler.config.get(setting, allowed[0])
        if value not in allowed:
            raise InputError(
                f"{setting}={value!r} of {name} is no linear step that is known here; choose from {allowed}: "
                f"{name}.from_config(scheduler.config, {setting}={allowed[0]!r})"
            )
    return reader.make(_Run.of(scheduler, steps))


@dataclass(frozen=True)
class _Run:
    """Steps of a scheduler once it was told their number, as it says them."""

    config: Mapping[str, Any]
    timesteps: tuple[int, ...]
    alpha_bar: Array  # (T,) by timestep
    final_alpha_bar: float  # of a timestep below 0

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> "_Run":
        stepped = copy.deepcopy(scheduler)
        most = stepped.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise InputError(f"steps={steps} is outside [1, {most}], the number of training timesteps")
        stepped.set_timesteps(steps)
        timesteps = tuple(int(t) for t in stepped.timesteps.tolist())
        if len(timesteps) != steps or any(after >= t for t, after in pairwise(timesteps)):
            raise InputError(f"{type(stepped).__name__} repeats timesteps at steps={steps}; use fewer steps")
        if timesteps[0] >= most or timesteps[-1] < 0:
            raise InputError(
                f"{type(stepped).__name__} runs from timestep {timesteps[0]} to {timesteps[-1]}, "
                f"outside [0, {most - 1}]; change its steps_offset or the number of steps"
            )
        return cls(
            stepped.config,
            timesteps,
            stepped.alphas_cumprod.to("cpu", torch.float64).numpy(),
            float(getattr(stepped, "final_alpha_cumprod", 1.0)),
        )

    def sampler(self, name: str, form: X0Form) -> Sampler:
        """Return the sampler of that name that takes these steps."""
        return form.sampler(name, self.timesteps, self.here, Prediction(self.config["prediction_type"]))

    @property
    def here(self) -> Array:
        """alpha_bar of each step, (S,)."""
        return self.alpha_bar[list(self.timesteps)]

    @property
    def there_by_order(self) -> Array:
        """alpha_bar of the step after each, 1 after the last, (S,)."""
        return np.append(self.here[1:], 1.0)

    @property
    def before(self) -> Array:
        """The timestep a stride below each, (S,), which need not be the next one."""
        return np.array(self.timesteps) - len(self.alpha_bar) // len(self.timesteps)

    @property
    def there_by_stride(self) -> Array:
        """alpha_bar a stride below each step, (S,)."""
        return np.where(self.before < 0, self.final_alpha_bar, self.alpha_bar[self.before])


def _ddpm(run: _Run) -> Sampler:
    here, there = run.here, run.there_by_order
    mean, beta = posterior_mean(here, there), 1.0 - here / there
    variance = np.maximum((1.0 - there) / (1.0 - here) * beta, _LEAST_VARIANCE)
    noise_on = np.where(np.array(run.timesteps) > 0, 1.0, 0.0)
    match run.config["variance_type"]:
        case "learned_range":
            noise = replace(mean, min_log=np.log(variance), max_log=np.log(beta), noise_on=noise_on)
        case "fixed_large":
            noise = replace(mean, sigma=np.sqrt(beta) * noise_on)
        case _:
            noise = replace(mean, sigma=np.sqrt(variance) * noise_on)
    return run.sampler("ddpm", noise)


def _ddim(run: _Run) -> Sampler:
    return run.sampler("ddim", ddim_form(run.here, run.there_by_stride))


def _cogvideox_ddim(run: _Run) -> Sampler:
    return run.sampler("cogvideox-ddim", ddim_form(run.here, run.there_by_stride))


def _dpm_solver(run: _Run) -> Sampler:
    config, steps, there = run.config, len(run.timesteps), run.there_by_order
    to_zero = config["final_sigmas_type"] == "zero"
    if not to_zero:
        there[-1] = run.alpha_bar[0]
    second_order = np.full(steps, config["solver_order"] == 2)
    second_order[0] = False
    if to_zero or config["euler_at_final"] or (config["lower_order_final"] and steps < 15):
        second_order[-1] = False
    rule = midpoint if config["solver_type"] == "midpoint" else heun
    name, noise = ("dpm-solver++", 0.0) if config["algorithm_type"] == "dpmsolver++" else ("sde-dpm-solver++", 1.0)
    return run.sampler(name, rule(run.here, there, second_order, noise))


def _cogvideox_dpm(run: _Run) -> Sampler:
    second_order = run.before >= 0
    second_order[0] = False
    return run.sampler("cogvideox-dpm", midpoint(run.here, run.there_by_stride, second_order, noise=1.0))


@dataclass(frozen=True)
class _Reader:
    """Reader of one class of schedulers: the maker of its sampler, and the settings that this can take, by name."""

    make: Callable[[_Run], Sampler]
    settings: Mapping[str, tuple[Any, ...]]


_COMMON: Final[Mapping[str, tuple[Any, ...]]] = {
    "prediction_type": tuple(prediction.value for prediction in Prediction),
    "thresholding": (False,),
}
_OFF: Final[tuple[Any, ...]] = (False, None)
_READERS: Final[Mapping[str, _Reader]] = MappingProxyType(
    {
        "DDPMScheduler": _Reader(
            _ddpm,
            {
                "clip_sample": (False,),
                "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
            },
        ),
        "DDIMScheduler": _Reader(_ddim, {"clip_sample": (False,)}),
        "DPMSolverMultistepScheduler": _Reader(
            _dpm_solver,
            {
                "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
                "solver_order": (2, 1),
                "solver_type": ("midpoint", "heun"),
                "final_sigmas_type": ("zero", "sigma_min"),
                "variance_type": (None,),
                "use_karras_sigmas": _OFF,
                "use_exponential_sigmas": _OFF,
                "use_beta_sigmas": _OFF,
                "use_lu_lambdas": _OFF,
                "use_flow_sigmas": _OFF,
                "use_dynamic_shifting": _OFF,
            },
        ),
        "CogVideoXDDIMScheduler": _Reader(_cogvideox_ddim, {}),
        "CogVideoXDPMScheduler": _Reader(_cogvideox_dpm, {}),
    }
)
