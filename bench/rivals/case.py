"""What all contenders are given."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from bench.step_cases import CFG_SCALE
from ebcache_fast.engine.buffers import latent_dtype
from ebcache_fast.models import Denoiser, as_denoiser
from ebcache_fast.plan import Plan, StepType
from ebcache_fast.samplers import Sampler, make_sampler, trajectory_noise


@dataclass(frozen=True)
class Case:
    """A model of the original layout, a plan of whole steps over DDPM's timesteps, and a guided batch."""

    model: nn.Module
    plan: Plan
    samples: int
    cfg_scale: float = CFG_SCALE

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model as our engine sees it."""
        return as_denoiser(self.model)

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
        """DDPM over the plan's steps."""
        return make_sampler("ddpm", len(self.plan))

    @cached_property
    def types(self) -> tuple[StepType, ...]:
        """Of each step."""
        found = tuple(step.step_type for step in self.plan.steps)
        assert None not in found, "rivals know whole steps only"
        return found  # type: ignore[return-value]

    @cached_property
    def labels(self) -> Tensor:
        """(N,)"""
        return torch.arange(self.samples, device=self.device) % self.denoiser.num_classes

    @cached_property
    def row_labels(self) -> Tensor:
        """(2N,): the labels, then as many null labels."""
        return torch.cat([self.labels, torch.full_like(self.labels, self.denoiser.num_classes)])

    @cached_property
    def noise(self) -> Tensor:
        """(S + 1, N, C, H, W): the initial latents, and the noise of each step."""
        drawn = trajectory_noise(0, range(self.samples), len(self.plan), self.denoiser.latent_shape)
        return drawn.to(self.device, latent_dtype(self.denoiser))

    @cached_property
    def rows(self) -> Tensor:
        """(S, 6): the sampler's coefficients."""
        return torch.tensor(self.sampler.rows, dtype=self.noise.dtype, device=self.device)

    def uncached(self) -> "Case":
        """The same with every step computed."""
        plan = Plan.uncached(self.plan.timesteps, self.plan.depth, self.plan.branches, self.plan.eps_scale)
        return replace(self, plan=plan)
