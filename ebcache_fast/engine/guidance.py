"""From the model's raw output to scaled eps: classifier-free guidance, then eps scaling, exactly once."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebcache_fast import ops
from ebcache_fast.errors import InputError
from ebcache_fast.models.denoiser import Denoiser

GUIDED_CHANNELS = 3  # the original DiT guides the first three eps channels


class Prediction(NamedTuple):
    """What a sampler needs of a step, both (N, C, H, W); ``variance`` is None where a model learned none."""

    eps: Tensor
    variance: Tensor | None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: its scale, 1 for none, and how many eps channels it reaches.

    Raises InputError unless the scale is finite and 0 or more, and at least one channel is guided.
    """

    scale: float
    channels: int = GUIDED_CHANNELS

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise InputError(f"cfg_scale={self.scale} is outside [0, inf); use 1 for no guidance, 1.5 to start from")
        if self.channels < 1:
            raise InputError(f"guided channels={self.channels} is below 1; use cfg_scale=1 for no guidance")

    @property
    def active(self) -> bool:
        """Whether unconditional rows are needed."""
        return self.scale != 1.0

    def row_labels(self, denoiser: Denoiser, labels: Tensor) -> Tensor:
        """Labels (N,) of all batch rows: the conditional ones, then, if needed, as many null labels.

        Raises InputError where null labels are needed and the model has none.
        """
        if not self.active:
            return labels
        if not denoiser.has_null_label:
            raise InputError(f"cfg_scale={self.scale} needs a null label, which this model has not; use cfg_scale=1")
        return torch.cat([labels, torch.full_like(labels, denoiser.num_classes)])

    def predict(self, out: Tensor, channels: int, eps_scale: float) -> Prediction:
        """Model output (rows, C or 2C, H, W) -> guided eps times ``eps_scale``, the conditional variance."""
        cond, uncond = out.chunk(2) if self.active else (out, None)
        eps = cond[:, :channels]
        if uncond is not None:
            eps = ops.guide(eps, uncond[:, :channels], self.scale, min(self.channels, channels))
        variance = cond[:, channels:] if out.shape[1] > channels else None
        return Prediction(eps * eps_scale, variance)
