"""A step of any sampler, as a formula in the coefficients of its timestep (``samplers.coefficients``).

Latents x are (B, C, H, W), in float32 or float64, whatever the model's dtype.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sampler_update(
    x: Tensor,
    eps: Tensor,
    variance: Tensor | None,
    noise: Tensor | None,
    row: Tensor | NDArray[np.float64],
    previous: Tensor | None = None,
) -> Tensor:
    """Take a sampler's step: x' = cx*x + ce*eps + (noise_on*exp(log_var/2) + sigma) * noise + cp*previous.

    x, eps, variance, noise, previous: (B, C, H, W). Computed in x's dtype, float32 or float64; returns new memory.
    eps: the noise prediction after guidance and after multiplication by eps_scale.
    variance: the model's raw variance output v; log_var goes from min_log at v = -1 to max_log at v = 1, and
    on beyond (IDDPM, arXiv 2102.09672, equation 15). None, for a model without one, means v = -1.
    noise: standard normal; None where the sampler draws none, or for the mean alone.
    row: one row of `Sampler.rows`, or a tensor of it on x's device, which the host never reads.
    previous: what `remember` made of the step before, 0 before the first; None for a sampler without a memory.
    """
    cx, ce, min_log, max_log, noise_on, sigma = row[:6]
    mean: Tensor = x * cx + eps.to(x.dtype) * ce
    if previous is not None:
        mean = mean + previous * row[6]
    if noise is None:
        return mean
    fraction = x.new_zeros(()) if variance is None else (variance.to(x.dtype) + 1.0) * 0.5
    log_var = fraction * (max_log - min_log) + min_log
    deviation: Tensor = torch.exp(log_var * 0.5) * noise_on + sigma
    return mean + deviation * noise.to(x.dtype)


def remember(x: Tensor, eps: Tensor, row: Tensor | NDArray[np.float64]) -> Tensor:
    """Return the memory that a sampler keeps of a step for the next: px*x + pe*eps, all as for `sampler_update`."""
    px, pe = row[7:]
    kept: Tensor = x * px + eps.to(x.dtype) * pe
    return kept
