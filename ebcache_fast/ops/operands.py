"""Operands of the fused operations: small named tuples of tensors, the same for torch and for Triton.

Modulation vectors come as tables over the whole trajectory, (S, U, D): S steps, U distinct conditions, D channels.
`StepIndex` says which row of them a batch row takes in the step at hand. Which step that is stays on the device and is
advanced there, so that one captured graph serves every step.
"""

from typing import NamedTuple

from torch import Tensor


class Advance(NamedTuple):
    """Hand-over to a later operation, done by one besides its own work: ``to = step + by``.

    It never writes the step that it reads, which other programs of the same launch may read still.
    """

    to: Tensor  # (1,) int32
    by: int


class StepIndex(NamedTuple):
    """Place in the tables that the step at hand reads."""

    step: Tensor  # (1,) int32: the executed step
    row_of: Tensor  # (R,) int32: each batch row's condition
    advance: Advance | None = None


class Norm(NamedTuple):
    """A LayerNorm and the modulation of its output: ``(LN(h) * weight + bias) * (1 + scale) + shift``."""

    shift: Tensor  # (S, U, D)
    scale: Tensor  # (S, U, D)
    eps: float
    weight: Tensor | None = None  # (D,), of LayerNorms that have them
    bias: Tensor | None = None  # (D,)


class Quantised(NamedTuple):
    """A matrix in float8_e4m3fn with a scale for each row: ``values * scales[..., None]``."""

    values: Tensor  # (..., D) float8_e4m3fn
    scales: Tensor  # (...) float32


class Patches(NamedTuple):
    """The map from latents to tokens: one linear map of each p x p patch, and a position embedding."""

    weight: Tensor  # (D, C, p, p)
    bias: Tensor  # (D,)
    positions: Tensor  # (T, D)


class Linear(NamedTuple):
    """Linear map in torch's layout: ``x @ weight.T + bias``."""

    weight: Tensor  # (out, in)
    bias: Tensor  # (out,)


class GuidanceArgs(NamedTuple):
    """Classifier-free guidance and eps scaling. Source: Ho and Salimans, arXiv 2207.12598, eq. 6, scale = 1 + w."""

    settings: Tensor  # (2,): the guidance scale, and b, the factor on eps; the host never reads it
    channels: int  # how many eps channels guidance reaches
    eps_channels: int  # how many of the output's channels are eps; those after them are the variance
    copies: int  # 2 where unconditional rows follow the conditional ones, else 1: no guidance


class Update(NamedTuple):
    """A sampler's steps: ``x' = cx * x + ce * eps + (noise_on * exp(log_var / 2) + sigma) * noise + cp * previous``.

    What a multistep sampler remembers for the step that comes next is linear as well, in x as it was before the step:
    ``previous' = px * x + pe * eps``.
    """

    coefficients: Tensor  # (S, 6): cx, ce, min_log, max_log, noise_on, sigma; (S, 9) with a memory: then cp, px, pe
    noise: Tensor | None  # (S, B, C, H, W), standard normal; None where the sampler draws none
    previous: Tensor | None = None  # (B, C, H, W), overwritten by each step; None where the sampler has no memory
