"""Algorithm 1 of EB-Cache: along one trajectory, try every candidate step and let each sample vote.

Source: Zou et al., "Exposure Bias Reduction for Enhancing Diffusion Transformer Feature Caching" (arXiv
2503.07120), section 4.1. Where the text leaves a choice open, `Algorithm1` has a field for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ebcache_fast.calibration.samples import SampleError
from ebcache_fast.calibration.tally import CANDIDATES, Tally, may_cache
from ebcache_fast.engine.buffers import latent_dtype
from ebcache_fast.engine.cache import FeatureCache, every_output
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.runner import Runner
from ebcache_fast.engine.trajectory import Prediction, split
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.errors import EBCacheError, InputError
from ebcache_fast.models import Conditioning, Denoiser
from ebcache_fast.models.float8 import Float8Branches
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops.fallback import Fallback
from ebcache_fast.ops.update import remember, sampler_update
from ebcache_fast.plan import StepPlan, StepType, lower
from ebcache_fast.samplers import Sampler


@dataclass(frozen=True, kw_only=True)
class Algorithm1:
    """The choices of Algorithm 1. A candidate passes at index i of T if its error is below ``a + k * i / T``.

    criterion: "vector" is the RMS over all eps elements of the difference between original and candidate;
        "norm", the paper's, is the difference of the two norms, which is blind to direction.
    norm: "rms" divides the paper's "l2" norm by the square root of the number of elements; only then are its
        thresholds meaningful (for 4x32x32 latents the L2 norm is 64 times larger).
    compare_scaled: multiply both outputs by b before they are compared; the paper multiplies the candidate
        alone, which sets a floor of about ``|1 - b|`` under every error.
    max_run: at most so many cached steps in a row; None for no limit, as in the paper.

    Raises InputError for thresholds that are not finite, an unknown criterion or norm, a max_run below 1.
    """

    a: float = 0.05
    k: float = 0.15
    criterion: Literal["vector", "norm"] = "vector"
    norm: Literal["rms", "l2"] = "rms"
    compare_scaled: bool = True
    max_run: int | None = 3

    def __post_init__(self) -> None:
        if not math.isfinite(self.a) or not math.isfinite(self.k):
            raise InputError(f"thresholds a={self.a} and k={self.k} must be finite; the paper's are 0.05 and 0.15")
        if self.criterion not in ("vector", "norm"):
            raise InputError(f"criterion={self.criterion!r} is unknown; choose vector or norm")
        if self.norm not in ("rms", "l2"):
            raise InputError(f"norm={self.norm!r} is unknown; choose rms or l2")
        if self.max_run is not None and self.max_run < 1:
            raise InputError(f"max_run={self.max_run} is below 1; use None for no limit")

    def threshold(self, step: int, steps: int) -> float:
        """delta(t) = a + k * t / T at executed step ``step``, whose respaced index is ``T - 1 - step``."""
        return self.a + self.k * (steps - 1 - step) / steps

    def error(self, original: Tensor, candidate: Tensor, eps_scale: float) -> Tensor:
        """Return each sample's error (N,) between two unscaled eps (N, C, H, W)."""
        original = original * eps_scale if self.compare_scaled else original
        candidate = candidate * eps_scale
        if self.criterion == "vector":
            return self._norm(original - candidate)
        return (self._norm(original) - self._norm(candidate)).abs()

    def _norm(self, eps: Tensor) -> Tensor:
        flat = eps.flatten(1)
        norm: Tensor = torch.linalg.vector_norm(flat, dim=1)
        return norm / math.sqrt(flat.shape[1]) if self.norm == "rms" else norm


@torch.no_grad()
def tally_batch(
    denoiser: Denoiser,
    labels: Tensor,
    noise: Tensor,
    sampler: Sampler,
    guidance: Guidance,
    eps_scale: float,
    algorithm: Algorithm1,
    on_step: Callable[[int], None] | None = None,
    context: Conditioning = (),
    float8_of: nn.Module | None = None,
) -> Tally:
    """Sample one batch, advanced by the original output times b; count what each sample would have cached.

    labels (N,), noise (steps + 1, N, C, H, W), or (1, …) for a sampler that draws none. context: of all batch rows, the
    conditional ones first. Every sample follows its own decisions: its cache takes over a step's outputs only where
    that step, as voted, computes them. float8_of: the module whose branches run in float8 where they can, if they are
    to. Raises SampleError where an output is not finite, or the model raises.
    """
    steps = sampler.steps
    tally = Tally.empty(steps)
    tally.samples = len(labels)
    denoiser = denoiser.for_shape(tuple(noise.shape[2:]), context)
    search = _Search(denoiser, labels, sampler.timesteps, guidance, context, float8_of)
    scaling, factor = sampler.scaling_eps(eps_scale)
    rows = torch.as_tensor(scaling.rows.copy(), dtype=noise.dtype, device=noise.device)
    run = torch.zeros_like(labels)  # (N,) cached steps since each sample's last full one
    x = noise[0]
    previous = torch.zeros_like(x) if sampler.has_memory else None
    for step in range(steps):
        original = search.full(x, step)
        choice = torch.zeros_like(labels)  # (N,) columns of CANDIDATES
        if may_cache(step, steps):
            allowed = run < (steps if algorithm.max_run is None else algorithm.max_run)
            threshold = algorithm.threshold(step, steps)
            for column, cached in ((1, search.attention(x, step)), (2, search.attn_mlp(x, step))):
                error = algorithm.error(original.eps, cached.eps, eps_scale)
                choice = torch.where(allowed & (error < threshold), column, choice)
                tally.errors[step, column] = float(error.double().sum())
        search.keep(choice)
        run = torch.where(choice == 0, 0, run + 1)
        tally.votes[step] = torch.bincount(choice, minlength=3).cpu().numpy()
        step_noise = noise[step + 1] if len(noise) > 1 else None
        out = original.eps * factor
        stepped = sampler_update(x, out, original.variance, step_noise, rows[step], previous)
        previous = None if previous is None else remember(x, out, rows[step])
        x = stepped
        if on_step is not None:
            on_step(len(labels))
    return tally


class _Search:
    """The candidate steps on one batch, and its caches: every sample's own, kept, and two to try in."""

    def __init__(
        self,
        denoiser: Denoiser,
        labels: Tensor,
        timesteps: tuple[int, ...],
        guidance: Guidance,
        context: Conditioning,
        float8_of: nn.Module | None,
    ) -> None:
        shape, weight = denoiser.shape, denoiser.weight()
        row_labels = guidance.row_labels(denoiser, labels)
        per_run = Workspace(weight.dtype, weight.device)
        denoiser.precompute(context, per_run)
        float8 = None if float8_of is None else Float8Branches(float8_of, per_run)
        if float8 is not None:
            float8.prepare()
        self._runner = Runner(
            denoiser,
            Fallback(ops.select(weight.device, weight.dtype)).operations,
            ModulationTable.of(denoiser, timesteps, row_labels, context),
            guidance.guide(denoiser, 1.0, latent_dtype(denoiser)),
            Workspace(weight.dtype, weight.device),
            per_run,
            float8,
        )
        self._rows, self._out_channels = len(row_labels), denoiser.out_channels
        self._copies = len(row_labels) // len(labels)
        self._kept, self._fresh, self._trial = (
            FeatureCache.full(shape, len(row_labels), weight.dtype, weight.device) for _ in range(3)
        )
        float8_sites = frozenset[int]() if float8 is None else float8.sites
        memory = every_output(shape)
        self._programs = {
            kind: lower(
                StepPlan.uniform(kind, shape.sites), shape.site_shapes, memory, samples=False, float8=float8_sites
            )
            for kind in CANDIDATES
        }

    def full(self, x: Tensor, step: int) -> Prediction:
        """Predict with everything computed; the branches' outputs wait in ``_fresh``."""
        return self._run(x, step, StepType.NO_CACHE, self._fresh)

    def attention(self, x: Tensor, step: int) -> Prediction:
        """Predict with kept attention; the outputs of the other branches wait in ``_trial``."""
        everywhere = torch.ones(self._rows, dtype=torch.bool, device=x.device)
        self._trial.copy_rows(self._kept, self._programs[StepType.ATTENTION].reads, everywhere)
        return self._run(x, step, StepType.ATTENTION, self._trial)

    def attn_mlp(self, x: Tensor, step: int) -> Prediction:
        """Predict with every branch's kept output."""
        return self._run(x, step, StepType.ATTN_MLP, self._kept)

    def keep(self, choice: Tensor) -> None:
        """Refresh each sample's cache with what its chosen step, choice (N,), computed."""
        for column, source in ((0, self._fresh), (1, self._trial)):
            rows = (choice == column).repeat(self._copies)
            self._kept.copy_rows(source, self._programs[CANDIDATES[column]].writes, rows)

    def _run(self, x: Tensor, step: int, kind: StepType, cache: FeatureCache) -> Prediction:
        out = x.new_empty(self._rows, self._out_channels, *x.shape[2:])
        where = f"at step {step} ({kind.name})"
        try:
            self._runner.clock.set(step)
            self._runner.predict(self._programs[kind], x, cache, out)
        except EBCacheError:
            raise
        except Exception as error:
            raise SampleError(f"the model raised {type(error).__name__} {where}: {error}") from error
        finite = out.isfinite().flatten(1).all(dim=1)  # (R,)
        if not finite.all():
            raise SampleError(f"the model's output {where} is not finite", int(finite.int().argmin()) % len(x))
        return split(out, len(x), x.shape[1])
