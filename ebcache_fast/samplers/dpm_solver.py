"""DPM-Solver++: a multistep solver of the diffusion's ODE, or of its SDE, for few steps."""

import numpy as np
from numpy.typing import NDArray

from ebcache_fast.samplers.coefficients import Sampler
from ebcache_fast.samplers.schedule import NoiseSchedule, solver_timesteps
from ebcache_fast.samplers.x0_form import Array, X0Form


def dpm_solver(schedule: NoiseSchedule, steps: int) -> Sampler:
    """Second-order DPM-Solver++ over `steps` timesteps spread evenly (`solver_timesteps`), as PixArt-Sigma runs it.

    Raises InputError when steps is outside [1, train_steps - 1].
    """
    return dpm_solver_over(schedule.respace(solver_timesteps(schedule.train_steps, steps)))


def dpm_solver_over(schedule: NoiseSchedule) -> Sampler:
    """DPM-Solver++ of exactly the timesteps of `schedule`; of second order, but for the first and the last step."""
    second_order = np.ones(schedule.steps, dtype=np.bool_)
    second_order[[0, -1]] = False
    form = midpoint(schedule.alpha_bar, schedule.alpha_bar_prev, second_order)
    return form.sampler("dpm-solver++", schedule.timesteps, schedule.alpha_bar)


def midpoint(here: Array, there: Array, second_order: NDArray[np.bool_], noise: float = 0.0) -> X0Form:
    """DPM-Solver++ from alpha_bar `here` to alpha_bar `there`, (S,) each, of second order where that array says so.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 2 and, with noise=1, the SDE's solver of their appendix. With
    alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha / sigma), h the growth of lambda in this
    step, h0 that from the step before to this one, and k = 1 + noise:

        x' = sigma' / sigma * e^(-noise * h) * x + alpha' * (1 - e^(-k * h)) * (x0 + h / (2 * h0) * (x0 - x0_before))
             + noise * sigma' * sqrt(1 - e^(-2 * h)) * (standard normal)
    """
    form, growth, growth_before = _first_order(here, there, noise)
    with np.errstate(invalid="ignore"):
        return _second_order(form, second_order, form.on_x0 / 2.0 * growth / growth_before)


def heun(here: Array, there: Array, second_order: NDArray[np.bool_], noise: float = 0.0) -> X0Form:
    """Heun's second-order rule for `midpoint`'s: alpha' * (h - (1 - e^(-k * h)) / k) / h0 * (x0 - x0_before)."""
    form, growth, growth_before = _first_order(here, there, noise)
    with np.errstate(invalid="ignore"):
        slope = (np.sqrt(there) * growth - form.on_x0 / (1.0 + noise)) / growth_before
        return _second_order(form, second_order, slope)


def _first_order(here: Array, there: Array, noise: float) -> tuple[X0Form, Array, Array]:
    """The first-order step, h, and h0: NaN at the first step. lambda may be infinite, at either end."""
    alpha, sigma, alpha_next, sigma_next = (np.sqrt(square) for square in (here, 1.0 - here, there, 1.0 - there))
    with np.errstate(divide="ignore"):
        log_snr, log_snr_next = np.log(alpha / sigma), np.log(alpha_next / sigma_next)
    decay = alpha * sigma_next / (sigma * alpha_next)  # e^-h
    form = X0Form(
        on_x=sigma_next / sigma * decay**noise,
        on_x0=alpha_next * (1.0 - decay ** (1.0 + noise)),
        sigma=noise * sigma_next * np.sqrt(1.0 - decay**2),
    )
    return form, log_snr_next - log_snr, log_snr - np.append(np.nan, log_snr[:-1])


def _second_order(form: X0Form, where: NDArray[np.bool_], slope: Array) -> X0Form:
    """The form with slope * (x0 - x0_before) added in those steps."""
    slope = np.where(where, slope, 0.0)
    return X0Form(form.on_x, form.on_x0 + slope, on_previous=-slope, sigma=form.sigma)
