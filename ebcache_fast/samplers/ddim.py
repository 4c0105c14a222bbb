"""DDIM: the deterministic sampler, and its stochastic relatives for eta above 0."""

import numpy as np

from ebcache_fast.errors import InputError
from ebcache_fast.noise_schedule import NoiseSchedule, respaced_timesteps
from ebcache_fast.samplers.coefficients import Sampler, StepRow


def ddim(schedule: NoiseSchedule, steps: int, eta: float = 0.0) -> Sampler:
    """DDIM over `steps` timesteps spread evenly over the training schedule (`respaced_timesteps`).

    Raises InputError when steps is outside [1, train_steps] or eta outside [0, 1].
    """
    return ddim_over(schedule.respace(respaced_timesteps(schedule.train_steps, steps)), eta)


def ddim_over(schedule: NoiseSchedule, eta: float = 0.0) -> Sampler:
    """DDIM that executes exactly the timesteps of `schedule`, for instance those of `ddim_timesteps`.

    Song et al. 2020 (arXiv 2010.02502), equation 12, with sigma from equation 16:

        x0 = (x - sqrt(1 - ab) * eps) / sqrt(ab)                                   (not clipped)
        x' = sqrt(ab_prev) * x0 + sqrt(1 - ab_prev - sigma^2) * eps + sigma * noise

    Both lines hold the same eps, a scaled one included, so that x' is linear in x and eps.
    Raises InputError when eta is outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta={eta} is outside [0, 1]; 0 is deterministic DDIM, 1 has the variance of DDPM")
    ab, ab_prev = schedule.alpha_bar, schedule.alpha_bar_prev
    sigma = eta * np.sqrt(schedule.posterior_variance)
    cx = np.sqrt(ab_prev / ab)
    ce = np.sqrt(1.0 - ab_prev - sigma**2) - cx * np.sqrt(1.0 - ab)
    zero = np.zeros(schedule.steps)
    rows = tuple(StepRow(*row) for row in np.stack((cx, ce, zero, zero, zero, sigma), axis=1).tolist())
    return Sampler("ddim", schedule.timesteps, rows)
