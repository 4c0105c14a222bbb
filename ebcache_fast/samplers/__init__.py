"""Samplers: a name, the timesteps in execution order, and one row of coefficients per step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from ebcache_fast.errors import InputError
from ebcache_fast.noise_schedule import NoiseSchedule, respaced_timesteps
from ebcache_fast.samplers.coefficients import Sampler, StepRow
from ebcache_fast.samplers.ddim import ddim, ddim_over
from ebcache_fast.samplers.ddpm import ddpm, ddpm_over
from ebcache_fast.samplers.noise import trajectory_noise

__all__ = [
    "SAMPLERS",
    "Sampler",
    "StepRow",
    "ddim",
    "ddim_over",
    "ddpm",
    "ddpm_over",
    "make_sampler",
    "sampler_over",
    "trajectory_noise",
]

SAMPLERS: Final[Mapping[str, Callable[[NoiseSchedule], Sampler]]] = MappingProxyType(
    {"ddpm": ddpm_over, "ddim": ddim_over}
)


def sampler_over(name: str, schedule: NoiseSchedule) -> Sampler:
    """The sampler of that name that executes exactly the timesteps of `schedule`.

    Raises InputError for an unknown name, listing the known ones.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name](schedule)


def make_sampler(name: str, steps: int, train_steps: int = 1000) -> Sampler:
    """The sampler of that name over `steps` steps of the linear schedule of `train_steps`, evenly spread.

    Raises InputError for an unknown name, listing the known ones, and for steps outside [1, train_steps].
    """
    schedule = NoiseSchedule.linear(train_steps)
    return sampler_over(name, schedule.respace(respaced_timesteps(train_steps, steps)))
