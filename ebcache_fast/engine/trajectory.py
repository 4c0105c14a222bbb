"""All the state of one sampling run."""

import torch
from torch import Tensor

from ebcache_fast.engine.feature_cache import FeatureCache
from ebcache_fast.engine.guidance import Guidance, Prediction
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.step import run_step
from ebcache_fast.errors import TrajectoryError
from ebcache_fast.models.denoiser import Denoiser
from ebcache_fast.plan import Plan


def latent_dtype(denoiser: Denoiser) -> torch.dtype:
    """The dtype that latents are kept and updated in: float64 for a float64 model, float32 for all others."""
    return torch.float64 if denoiser.weight().dtype == torch.float64 else torch.float32


class Trajectory:
    """One sampling run of a batch: its plan, modulation and caches. No other object holds state of the run.

    labels: (N,) int64 on the model's device. Steps must be asked for in order, each once, with N latents;
    anything else is a TrajectoryError, because a cache holds what the step before left in it.
    """

    @torch.no_grad()
    def __init__(self, denoiser: Denoiser, plan: Plan, labels: Tensor, guidance: Guidance) -> None:
        self._denoiser = denoiser
        self._plan = plan
        self._guidance = guidance
        self._samples = len(labels)
        rows = guidance.row_labels(denoiser, labels)
        weight = denoiser.weight()
        self._modulation = ModulationTable(denoiser, plan.timesteps, rows)
        self._cache = FeatureCache(denoiser.shape, plan.live_slots, len(rows), weight.dtype, weight.device)
        self._next_step = 0

    @property
    def nbytes(self) -> int:
        """Bytes of caches and modulation."""
        return self._cache.nbytes + self._modulation.nbytes

    @torch.no_grad()
    def predict(self, i: int, x: Tensor) -> Prediction:
        """Guided and scaled eps of executed step ``i`` for latents x (N, C, H, W), in x's dtype.

        A step that failed is still the next one, and may be tried again: it reads no slot that it writes.
        """
        if i != self._next_step or i == len(self._plan):
            raise TrajectoryError(
                f"step {i} was asked for, but {self._next_step} of {len(self._plan)} steps are done; "
                "run each once, in order from 0, and start a new trajectory for a new run"
            )
        if len(x) != self._samples:
            raise TrajectoryError(
                f"{len(x)} latents were given, but this trajectory is for {self._samples}, one a label; "
                "start a new trajectory for another batch"
            )
        u = x.to(self._denoiser.weight().dtype)
        out = run_step(self._denoiser, u, self._plan.steps[i], self._modulation.step(i), self._cache)
        self._next_step += 1
        return self._guidance.predict(out.to(x.dtype), x.shape[1], self._plan.eps_scale)
