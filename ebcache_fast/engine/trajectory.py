"""All the state of one sampling run."""

from typing import NamedTuple

import torch
from torch import Tensor

from ebcache_fast import ops
from ebcache_fast.engine.feature_cache import FeatureCache
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.step import StepRunner, runs
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.errors import TrajectoryError
from ebcache_fast.models.denoiser import Denoiser
from ebcache_fast.operands import Update
from ebcache_fast.plan import Plan


class Prediction(NamedTuple):
    """What a sampler needs of a step, both (N, C, H, W); ``variance`` is None where a model learned none."""

    eps: Tensor
    variance: Tensor | None


def latent_dtype(denoiser: Denoiser) -> torch.dtype:
    """The dtype that latents are kept and updated in: float64 for a float64 model, float32 for all others."""
    return torch.float64 if denoiser.weight().dtype == torch.float64 else torch.float32


class Trajectory:
    """One sampling run of a batch: its plan, modulation and caches. No other object holds state of the run.

    labels: (N,) int64 on the model's device. operations: what runs it; None means what `ops.select` chooses. Steps
    must be asked for in order, each once, with N latents; anything else is a TrajectoryError, because a cache holds
    what the step before left in it.
    """

    @torch.no_grad()
    def __init__(
        self,
        denoiser: Denoiser,
        plan: Plan,
        labels: Tensor,
        guidance: Guidance,
        operations: ops.Operations | None = None,
    ) -> None:
        rows = guidance.row_labels(denoiser, labels)
        weight = denoiser.weight()
        operations = operations or ops.select(weight.device, weight.dtype)
        self._plan = plan
        self._samples, self._rows = len(labels), len(rows)
        self._out_channels = denoiser.out_channels
        self._modulation = ModulationTable(denoiser, plan.timesteps, rows)
        self._cache = FeatureCache(denoiser.shape, plan.live_slots, len(rows), weight.dtype, weight.device)
        self._workspace = Workspace(weight.dtype, weight.device)
        guide = guidance.guide(denoiser, plan.eps_scale, latent_dtype(denoiser))
        self._runner = StepRunner(denoiser, operations, self._modulation, guide, self._workspace, rows=len(rows))
        self._runs = dict(runs(plan.steps))
        self._next_step = 0

    @property
    def nbytes(self) -> int:
        """Bytes of caches, modulation and working memory."""
        return self._cache.nbytes + self._modulation.nbytes + self._workspace.nbytes

    @torch.no_grad()
    def predict(self, i: int, x: Tensor) -> Prediction:
        """Guided and scaled eps of executed step ``i`` for latents x (N, C, H, W), in x's dtype.

        A step that failed is still the next one, and may be tried again: it reads no slot that it writes.
        """
        self._check(i, x)
        out = x.new_empty(self._rows, self._out_channels, *x.shape[2:])
        self._runner.predict(x, self._plan.steps[i], i, self._cache, out)
        self._next_step += 1
        return split(out, len(x), x.shape[1])

    @torch.no_grad()
    def advance(self, i: int, x: Tensor, update: Update) -> int:
        """Executed step ``i`` with the sampler's, and what runs together with it, on x (N, C, H, W) in place.

        Returns how many steps were done: more than one for ATTN_MLP steps in a row.
        """
        self._check(i, x)
        plan = self._plan.steps[i]
        count = self._runs.get(i, 1)
        if plan.computes_nothing:
            self._runner.run_update(x, plan, i, count, self._cache, update)
        else:
            self._runner.update(x, plan, i, self._cache, update)
        self._next_step += count
        return count

    def _check(self, i: int, x: Tensor) -> None:
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


def split(out: Tensor, samples: int, channels: int) -> Prediction:
    """eps and the variance output of the conditional rows of an output (R, Cout, H, W)."""
    cond = out[:samples]
    return Prediction(cond[:, :channels], cond[:, channels:] if cond.shape[1] > channels else None)
