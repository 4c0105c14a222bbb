"""DDPM: ancestral sampling with the variance the model learned."""

import numpy as np

from ebcache_fast.noise_schedule import NoiseSchedule, respaced_timesteps
from ebcache_fast.samplers.coefficients import Sampler, StepRow


def ddpm(schedule: NoiseSchedule, steps: int) -> Sampler:
    """DDPM over `steps` timesteps spread evenly over the training schedule (`respaced_timesteps`).

    Raises InputError when steps is outside [1, train_steps].
    """
    return ddpm_over(schedule.respace(respaced_timesteps(schedule.train_steps, steps)))


def ddpm_over(schedule: NoiseSchedule) -> Sampler:
    """DDPM that executes exactly the timesteps of `schedule`.

    Ho et al. 2020 (arXiv 2006.11239), equation 11, with the learned variance of Nichol and Dhariwal 2021
    (IDDPM, arXiv 2102.09672), equation 15, whose v is (v + 1) / 2 of the model's output v in [-1, 1]:

        x' = (x - beta / sqrt(1 - ab) * eps) / sqrt(1 - beta) + exp(log_var / 2) * noise
        log_var = (v + 1) / 2 * log beta + (1 - v) / 2 * log posterior variance

    The predicted x_0 is not clipped, so that x' is linear in x and eps. The last step adds no noise.
    """
    root_alpha = np.sqrt(1.0 - schedule.beta)
    cx = 1.0 / root_alpha
    ce = -schedule.beta / (np.sqrt(1.0 - schedule.alpha_bar) * root_alpha)
    noise_on = np.ones(schedule.steps)
    noise_on[-1] = 0.0
    columns = (cx, ce, schedule.posterior_log_variance, schedule.log_beta, noise_on, np.zeros(schedule.steps))
    rows = tuple(StepRow(*row) for row in np.stack(columns, axis=1).tolist())
    return Sampler("ddpm", schedule.timesteps, rows)
