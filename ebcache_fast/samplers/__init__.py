"""Samplers: a name, the timesteps in execution order, and one row of coefficients per step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from ebcache_fast.errors import InputError
from ebcache_fast.samplers.coefficients import Sampler, StepRow, scaled_v
from ebcache_fast.samplers.ddim import ddim, ddim_over
from ebcache_fast.samplers.ddpm import ddpm, ddpm_over
from ebcache_fast.samplers.dpm_solver import dpm_solver, dpm_solver_over
from ebcache_fast.samplers.from_diffusers import sampler_of
from ebcache_fast.samplers.noise import trajectory_noise
from ebcache_fast.samplers.schedule import NoiseSchedule

__all__ = [
    "SAMPLERS",
    "Sampler",
    "SamplerMaker",
    "StepRow",
    "ddim",
    "ddim_over",
    "ddpm",
    "ddpm_over",
    "dpm_solver",
    "dpm_solver_over",
    "make_sampler",
    "sampler_of",
    "sampler_over",
    "scaled_v",
    "trajectory_noise",
]


class SamplerMaker(NamedTuple):
    """Makers of a sampler: over so many timesteps of its own choice, and over exactly those of a schedule."""

    by_steps: Callable[[NoiseSchedule, int], Sampler]
    over: Callable[[NoiseSchedule], Sampler]


SAMPLERS: Final[Mapping[str, SamplerMaker]] = MappingProxyType(
    {
        "ddpm": SamplerMaker(ddpm, ddpm_over),
        "ddim": SamplerMaker(ddim, ddim_over),
        "dpm-solver++": SamplerMaker(dpm_solver, dpm_solver_over),
    }
)


def sampler_over(name: str, schedule: NoiseSchedule) -> Sampler:
    """The sampler of that name that executes exactly the timesteps of `schedule`.

    Raises InputError for an unknown name, listing the known ones.
    """
    return _maker(name).over(schedule)


def make_sampler(name: str, steps: int, train_steps: int = 1000) -> Sampler:
    """The sampler of that name over `steps` steps of the linear schedule of `train_steps`, spread as it does.

    Raises InputError for an unknown name, listing the known ones, and for steps outside [1, train_steps], for
    "dpm-solver++" [1, train_steps - 1].
    """
    return _maker(name).by_steps(NoiseSchedule.linear(train_steps), steps)


def _maker(name: str) -> SamplerMaker:
    if name not in SAMPLERS:
        raise InputError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
