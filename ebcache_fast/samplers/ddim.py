"""DDIM: the deterministic sampler, and its stochastic relatives for eta above 0."""

import numpy as np

from ebcache_fast.errors import InputError
from ebcache_fast.samplers.coefficients import Sampler
from ebcache_fast.samplers.schedule import NoiseSchedule, respaced_timesteps
from ebcache_fast.samplers.x0_form import Array, X0Form


def ddim(schedule: NoiseSchedule, steps: int, eta: float = 0.0) -> Sampler:
    """DDIM over `steps` timesteps spread evenly over the training schedule (`respaced_timesteps`).

    Raises InputError when steps is outside [1, train_steps] or eta outside [0, 1].
    """
    return ddim_over(schedule.respace(respaced_timesteps(schedule.train_steps, steps)), eta)


def ddim_over(schedule: NoiseSchedule, eta: float = 0.0) -> Sampler:
    """DDIM that executes exactly the timesteps of `schedule`, for instance those of `ddim_timesteps`.

    Raises InputError when eta is outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta={eta} is outside [0, 1]; 0 is deterministic DDIM, 1 has the variance of DDPM")
    form = ddim_form(schedule.alpha_bar, schedule.alpha_bar_prev, eta * np.sqrt(schedule.posterior_variance))
    return form.sampler("ddim", schedule.timesteps, schedule.alpha_bar)


def ddim_form(here: Array, there: Array, sigma: Array | float = 0.0) -> X0Form:
    """DDIM from alpha_bar `here` to alpha_bar `there`, (S,) each, with noise of deviation sigma.

    Song et al. 2020 (arXiv 2010.02502), equation 12, with sigma from equation 16:

        x' = sqrt(there) * x0 + sqrt(1 - there - sigma^2) * eps + sigma * noise
        eps = (x - sqrt(here) * x0) / sqrt(1 - here)

    x0, not clipped, and eps hold the same output, a scaled one included, so that x' is linear in x and the output.
    """
    on_eps = np.sqrt(1.0 - there - sigma**2) / np.sqrt(1.0 - here)
    return X0Form(on_x=on_eps, on_x0=np.sqrt(there) - np.sqrt(here) * on_eps, sigma=sigma)
