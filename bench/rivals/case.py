"""What all contenders are given."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from bench.step_cases import CFG_SCALE
from ebcache_fast.engine.buffers import latent_dtype
from ebcache_fast.engine.guidance import GUIDED_CHANNELS
from ebcache_fast.models import Conditioning, Denoiser, as_denoiser
from ebcache_fast.plan import Plan, StepType
from ebcache_fast.samplers import Sampler, make_sampler, trajectory_noise


@dataclass(frozen=True)
class Case:
    """A model, a plan of whole steps, and a guided batch: by labels, or by the context of all its rows."""

    model: nn.Module
    plan: Plan
    samples: int
    cfg_scale: float = CFG_SCALE
    context: Conditioning = ()
    sampler_name: str = "ddpm"
    guided_channels: int = GUIDED_CHANNELS

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model as our engine sees it, for its own size of latents."""
        denoiser = as_denoiser(self.model)
        return denoiser.for_shape(denoiser.latent_shape, self.context)

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.denoiser.weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.denoiser.weight().dtype

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler over the plan's steps."""
        return make_sampler(self.sampler_name, len(self.plan))

    @cached_property
    def types(self) -> tuple[StepType, ...]:
        """Of each step."""
        found = tuple(step.step_type for step in self.plan.steps)
        assert None not in found, "rivals know whole steps only"
        return found  # type: ignore[return-value]

    @cached_property
    def labels(self) -> Tensor:
        """(N,)"""
        return self.row_labels[: self.samples]

    @cached_property
    def row_labels(self) -> Tensor:
        """(2N,): the labels, then as many null labels."""
        return self._row_labels.to(self.device)

    @property
    def conditions(self) -> int:
        """How many different ones modulation is computed for."""
        return len(self.denoiser.conditions(self._row_labels).unique())

    @property
    def _row_labels(self) -> Tensor:
        """On the host."""
        labels = torch.arange(self.samples) % self.denoiser.num_classes
        return torch.cat([labels, torch.full_like(labels, self.denoiser.num_classes)])

    @cached_property
    def noise(self) -> Tensor:
        """(S + 1, N, C, H, W): the initial latents, and the noise of each step; (1, N, C, H, W) where none is drawn."""
        steps = len(self.plan) if self.sampler.draws_noise else 0
        drawn = trajectory_noise(0, range(self.samples), steps, self.denoiser.latent_shape)
        return drawn.to(self.device, latent_dtype(self.denoiser))

    def noise_at(self, step: int) -> Tensor | None:
        """What a step adds (N, C, H, W); None where nothing is drawn."""
        return self.noise[step + 1] if self.sampler.draws_noise else None

    @cached_property
    def rows(self) -> Tensor:
        """(S, 6): the sampler's coefficients."""
        return torch.tensor(self.sampler.rows, dtype=self.noise.dtype, device=self.device)

    def uncached(self) -> "Case":
        """The same with every step computed."""
        plan = Plan.uncached(self.plan.timesteps, self.plan.sites, self.plan.eps_scale)
        return replace(self, plan=plan)
