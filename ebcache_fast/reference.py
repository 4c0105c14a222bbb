"""The plain-torch truth of every fused operation: one function per kernel, with the kernel's signature.

Shapes: N rows of the batch (guidance counted), T tokens, D channels, K cache slots. Modulation vectors are
(N, D), one a row. All take and give one floating dtype; nothing here knows of models, plans or caches.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


def norm_modulate(h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``LayerNorm(h) * (1 + scale) + shift`` over the channels of h (N, T, D), no affine -> (N, T, D)."""
    normed = F.layer_norm(h, h.shape[-1:], eps=eps)
    return torch.addcmul(shift.unsqueeze(1), normed, (1 + scale).unsqueeze(1))


def gated_residual(h: Tensor, branches: Sequence[Tensor], gates: Sequence[Tensor]) -> Tensor:
    """``h + sum_k gates[k] * branches[k]``; branches (N, T, D), fresh or cached, ungated -> (N, T, D)."""
    for branch, gate in zip(branches, gates, strict=True):
        h = torch.addcmul(h, gate.unsqueeze(1), branch)
    return h


def gated_residual_norm_modulate(
    h: Tensor, branches: Sequence[Tensor], gates: Sequence[Tensor], shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream after ``branches``, and the next branch's modulated input: (h, u), both (N, T, D).

    With a cached attention output among ``branches`` this is the cached-attention substitution.
    """
    h = gated_residual(h, branches, gates)
    return h, norm_modulate(h, shift, scale, eps)


def gated_sum(h: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    """``h + sum_k gates[k] * slots[k]``: all layers of an ATTN_MLP step at once.

    h (N, T, D), slots (K, N, T, D), gates (K, N, D) -> (N, T, D). No branch runs in such a step, so that no
    layer waits for another.
    """
    total = h.clone()
    for slot, gate in zip(slots, gates, strict=True):
        total.addcmul_(gate.unsqueeze(1), slot)
    return total


def head_tokens(h: Tensor, shift: Tensor, scale: Tensor, linear: nn.Module, eps: float) -> Tensor:
    """Modulated LayerNorm and the last linear map, D to P; h (N, T, D) -> (N, T, P)."""
    return cast(Tensor, linear(norm_modulate(h, shift, scale, eps)))


def guide(eps_cond: Tensor, eps_uncond: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    """``eps_uncond + scale * (eps_cond - eps_uncond)`` on the first ``channels`` channels, else eps_cond.

    eps_cond, eps_uncond (N, C, H, W) -> the same shape. Source: Ho and Salimans, arXiv 2207.12598, eq. 6,
    with scale = 1 + w; a tensor of it stays on its device.
    """
    uncond = eps_uncond[:, :channels]  # (N, channels, H, W)
    guided: Tensor = uncond + scale * (eps_cond[:, :channels] - uncond)
    return torch.cat((guided, eps_cond[:, channels:]), dim=1)


def sampler_update(
    x: Tensor, eps: Tensor, variance: Tensor | None, noise: Tensor | None, row: Tensor | NDArray[np.float64]
) -> Tensor:
    """One sampler step: x' = cx*x + ce*eps + (noise_on*exp(log_var/2) + sigma) * noise.

    x, eps, variance, noise: (N, C, H, W). Computed in x's dtype, float32 or float64; returns new memory.
    eps: the noise prediction after guidance and after multiplication by eps_scale.
    variance: the model's raw variance output v; log_var goes from min_log at v = -1 to max_log at v = 1, and
    on beyond (IDDPM, arXiv 2102.09672, equation 15). None, for a model without one, means v = -1.
    noise: standard normal; None where the sampler draws none, or for the mean alone.
    row: one row of `Sampler.rows`, or a tensor of it on x's device, which the host never reads.
    """
    cx, ce, min_log, max_log, noise_on, sigma = row
    mean: Tensor = x * cx + eps.to(x.dtype) * ce
    if noise is None:
        return mean
    fraction = x.new_zeros(()) if variance is None else (variance.to(x.dtype) + 1.0) * 0.5
    log_var = fraction * (max_log - min_log) + min_log
    deviation: Tensor = torch.exp(log_var * 0.5) * noise_on + sigma
    return mean + deviation * noise.to(x.dtype)
