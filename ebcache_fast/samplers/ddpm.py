"""DDPM: ancestral sampling with the variance the model learned."""

from dataclasses import replace

import numpy as np

from ebcache_fast.samplers.coefficients import Sampler
from ebcache_fast.samplers.schedule import NoiseSchedule, respaced_timesteps
from ebcache_fast.samplers.x0_form import Array, X0Form


def ddpm(schedule: NoiseSchedule, steps: int) -> Sampler:
    """DDPM over `steps` timesteps spread evenly over the training schedule (`respaced_timesteps`).

    Raises InputError when steps is outside [1, train_steps].
    """
    return ddpm_over(schedule.respace(respaced_timesteps(schedule.train_steps, steps)))


def ddpm_over(schedule: NoiseSchedule) -> Sampler:
    """DDPM that executes exactly the timesteps of `schedule`, with a learned variance; the last step adds no noise.

    The variance is that of Nichol and Dhariwal 2021 (IDDPM, arXiv 2102.09672), equation 15, whose v is (v + 1) / 2
    of the model's output v in [-1, 1]:

        log_var = (v + 1) / 2 * log beta + (1 - v) / 2 * log posterior variance
    """
    noise_on = np.ones(schedule.steps)
    noise_on[-1] = 0.0
    mean = posterior_mean(schedule.alpha_bar, schedule.alpha_bar_prev)
    form = replace(mean, min_log=schedule.posterior_log_variance, max_log=schedule.log_beta, noise_on=noise_on)
    return form.sampler("ddpm", schedule.timesteps, schedule.alpha_bar)


def posterior_mean(here: Array, there: Array) -> X0Form:
    """The mean of x at alpha_bar `there` (S,) given x at alpha_bar `here` (S,) and x0, which is not clipped.

    Ho et al. 2020 (arXiv 2006.11239), equation 7.
    """
    alpha = here / there
    return X0Form(
        on_x=np.sqrt(alpha) * (1.0 - there) / (1.0 - here),
        on_x0=np.sqrt(there) * (1.0 - alpha) / (1.0 - here),
    )
