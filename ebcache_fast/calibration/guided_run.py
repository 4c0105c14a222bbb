"""Runs of a calibration: the guided noise of one step after another, and the sampler's step, on a batch of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ebcache_fast.calibration.samples import Prompted, SampleError, error_of
from ebcache_fast.engine.buffers import Tail, latent_dtype
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.trajectory import ForwardTrajectory, Prediction, split
from ebcache_fast.errors import EBCacheError
from ebcache_fast.models import Denoiser
from ebcache_fast.ops.update import remember, sampler_update
from ebcache_fast.plan import Correction, Plan, Slot
from ebcache_fast.samplers import Sampler, trajectory_noise


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Setting that all runs of a calibration share."""

    engine: Engine
    denoiser: Denoiser  # for the shape of the latents
    labels: Tensor  # (N,) of all samples
    prompted: Prompted
    sampler: Sampler
    guidance: Guidance
    eps_scale: float
    seed: int
    on_step: Callable[[int], None]

    @property
    def steps(self) -> int:
        """Number S of steps."""
        return self.sampler.steps

    def noise(self, samples: range) -> Tensor:
        """All noise of these samples, see `trajectory_noise`, on the model's device."""
        denoiser = self.denoiser
        drawn = self.steps if self.sampler.draws_noise else 0
        noise = trajectory_noise(self.seed, samples, drawn, denoiser.latent_shape, latent_dtype(denoiser))
        return noise.to(self.labels.device)


class GuidedRun:
    """A run of these samples under a plan, step by step, over memory of its own."""

    def __init__(self, setting: Setting, samples: range, plan: Plan, run: ForwardTrajectory) -> None:
        self._setting, self._samples, self._run = setting, samples, run
        self._corrections = plan.corrections or (Correction(),) * setting.steps
        self._noise = setting.noise(samples)
        self._zeros = torch.zeros_like(self._noise[0]) if setting.sampler.has_memory else None

    @classmethod
    @contextmanager
    def of(cls, setting: Setting, samples: range, plan: Plan) -> Iterator[Self]:
        """Lease memory for a run while it lasts; InputError where there is too little. The setting says the scale b."""
        engine, denoiser, guidance = setting.engine, setting.denoiser, setting.guidance
        row_labels = guidance.row_labels(denoiser, setting.labels[samples.start : samples.stop])
        channels = min(guidance.channels, denoiser.latent_shape[0]) if guidance.active else 0
        latents, context = tuple(denoiser.latent_shape), setting.prompted.context_of(samples)
        bare = replace(plan, eps_scale=1.0, corrections=())
        run = engine.forward_run(bare, Batch(row_labels, len(samples), channels, latents, context), Tail())
        try:
            if channels:
                run.guide(guidance.scale)
            yield cls(setting, samples, plan, run)
        finally:
            engine.release(run.buffer_set)

    @property
    def first(self) -> tuple[Tensor, Tensor | None]:
        """The latents (N, C, H, W) that the run begins with, and what a sampler with a memory has kept by then."""
        return self._noise[0], self._zeros

    def slot(self, slot: Slot) -> Tensor:
        """The memory of a kept value (R, T, D); the plan's steps read what is written there."""
        return self._run.buffer_set.buffers.cache.slot(slot)

    @torch.no_grad()
    def predict(self, step: int, x: Tensor, *, is_full: bool = False) -> Prediction:
        """The guided noise of a step, and the variance.

        Raises InputError where it is not finite, JobError where the model raises.
        """
        try:
            out = self._run.predict(step, x, is_full=is_full)
        except EBCacheError:
            raise
        except Exception as error:
            raise self._error(f"the model raised {type(error).__name__} at step {step}: {error}") from error
        finite = out.isfinite().flatten(1).all(dim=1)  # (R,)
        if not finite.all():
            row = int(finite.int().argmin()) % len(self._samples)
            raise self._error(f"the model's output at step {step} is not finite", row)
        return split(out, len(self._samples), x.shape[1])

    def _error(self, message: str, row: int | None = None) -> EBCacheError:
        setting = self._setting
        return error_of(self._samples, SampleError(message, row), setting.labels, setting.prompted.prompts)

    def update(
        self, step: int, x: Tensor, found: Prediction, memory: Tensor | None, correction: Correction | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The sampler's step: the next latents, and what it keeps of this one; ``memory`` is that of the one before.

        correction: of the noise, in the place of the plan's.
        """
        setting, has_memory = self._setting, self._zeros is not None
        of_step = _only(setting.sampler, step)
        scaled, factor = of_step.scaling_eps(setting.eps_scale, [correction or self._corrections[step]])
        row = np.array(scaled.step_rows[0])
        noise = self._noise[step + 1] if len(self._noise) > 1 else None
        eps = found.eps * factor
        after = sampler_update(x, eps, found.variance, noise, row, memory)
        return after, remember(x, eps, row) if has_memory else None


def _only(sampler: Sampler, step: int) -> Sampler:
    """A sampler of one of another's steps."""
    alpha_bar = None if sampler.v_alpha_bar is None else (sampler.v_alpha_bar[step],)
    only = slice(step, step + 1)
    return replace(sampler, timesteps=sampler.timesteps[only], step_rows=sampler.step_rows[only], v_alpha_bar=alpha_bar)
