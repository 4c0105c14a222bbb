"""Classifier-free guidance: which rows a batch needs for it, and what the last operation of a step is told."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import Denoiser
from ebcache_fast.ops.operands import GuidanceArgs

GUIDED_CHANNELS = 3  # the original DiT guides the first three eps channels


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
        """True if unconditional rows are needed."""
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

    def guide(self, denoiser: Denoiser, eps_scale: float, dtype: torch.dtype) -> GuidanceArgs:
        """Guidance with eps scaling as operands for ``denoiser``; ``dtype`` is that of the latents."""
        channels = denoiser.latent_shape[0]
        settings = torch.tensor([self.scale, eps_scale], dtype=dtype, device=denoiser.weight().device)
        return GuidanceArgs(settings, min(self.channels, channels), channels, copies=2 if self.active else 1)
