"""Votes of Algorithm 1 over many samples, counted batch by batch, and the table that they make."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from ebcache_fast.calibration import target as targets
from ebcache_fast.calibration.algorithm1 import Algorithm1, tally_batch
from ebcache_fast.calibration.identity import Options, identity_of, options_of
from ebcache_fast.calibration.progress import CalibrationProgress
from ebcache_fast.calibration.samples import Prompted, SampleError, error_of
from ebcache_fast.calibration.tally import KEEP_FIRST, KEEP_LAST, Tally
from ebcache_fast.engine.buffers import latent_dtype
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.models import Denoiser
from ebcache_fast.plan import StepType
from ebcache_fast.plan.table import CacheTable, Provenance, SamplerSpec
from ebcache_fast.samplers import Sampler, trajectory_noise

SEARCH_SAMPLES = 64  # a target cost is searched with so many; the table is then made with all


@dataclass(frozen=True, kw_only=True)
class Voting:
    """State of a calibration that stays the same while thresholds are tried."""

    denoiser: Denoiser
    algorithm: Algorithm1  # its a and k are where a search starts
    labels: Tensor
    prompted: Prompted
    sampler: Sampler
    spec: SamplerSpec
    guidance: Guidance
    eps_scale: float
    allow_amplify: bool
    seed: int
    batch_size: int
    progress: CalibrationProgress
    on_step: Callable[[int], None]
    on_total: Callable[[int], None]
    float8_of: nn.Module | None  # whose branches vote in float8, if they do

    @property
    def costs(self) -> targets.Costs:
        """MACs of a step of each candidate type, for one guidance branch."""
        return targets.step_costs(self.denoiser.shape)

    @property
    def few(self) -> int:
        """Number of samples that vote while a threshold is searched."""
        return min(SEARCH_SAMPLES, len(self.labels))

    def table_near(self, target: float) -> CacheTable:
        """The table of all samples whose speed-up by MACs is nearest to ``target``; one that stays away is said."""
        steps, costs = self.sampler.steps, self.costs
        tried: list[Algorithm1] = []

        def types_at(factor: float, left: int) -> list[StepType]:
            tried.append(self._times(factor))
            tally = self.tally(tried[-1], self.few, more=left * self.few + len(self.labels) - self.few)
            return tally.winners(self.algorithm.max_run)

        reach = targets.speedup_of(targets.fastest(steps, self.algorithm), costs)
        algorithm = self._times(targets.loosened(types_at, target, reach, costs))
        tally = self.tally(algorithm, len(self.labels))
        voted = tally.winners(algorithm.max_run)
        types = targets.give_back(voted, tally, algorithm, target, costs)
        reached = targets.speedup_of(types, costs)
        if abs(reached - target) > targets.TOLERANCE * target:
            logging.getLogger(__name__).warning("the table has %.2fx by MACs, not target_speedup=%g", reached, target)
        given_back = sum(vote is not kept for vote, kept in zip(voted, types, strict=True))
        found = {"target_speedup": target, "speedup": round(reached, 4), "rounds": len(tried), "given_back": given_back}
        return self.table(algorithm, tally, types, votes=len(tried) * self.few + len(self.labels) - self.few, **found)

    def table_of_votes(self) -> CacheTable:
        """Return the table that all samples vote for, at the thresholds as they are."""
        tally = self.tally(self.algorithm, len(self.labels))
        return self.table(self.algorithm, tally, tally.winners(self.algorithm.max_run), votes=tally.samples)

    def table(
        self, algorithm: Algorithm1, tally: Tally, types: list[StepType], votes: int, **found: float
    ) -> CacheTable:
        """A table of these steps, with what it took: ``votes`` of one sample each, in all."""
        no_cache, attention, attn_mlp = tally.votes.T.tolist()
        samplings = votes * self.cost()
        provenance = Provenance(
            by="ebcache_fast.calibrate",
            source="Algorithm 1 of EB-Cache (arXiv 2503.07120)",
            options=self.options()
            | {"a": algorithm.a, "k": algorithm.k, "samples": tally.samples}
            | found
            | {"samplings": round(samplings, 1), "samplings_a_sample": round(samplings / tally.samples, 3)},
            errors={
                "ATTENTION": tally.mean_errors(StepType.ATTENTION),
                "ATTN_MLP": tally.mean_errors(StepType.ATTN_MLP),
            },
            votes={"NO_CACHE": tuple(no_cache), "ATTENTION": tuple(attention), "ATTN_MLP": tuple(attn_mlp)},
        )
        return CacheTable(
            self.sampler.timesteps,
            types,
            eps_scale=self.eps_scale,
            sampler=self.spec,
            model=dict(self.denoiser.shape.sizes),
            made=provenance,
            allow_amplify=self.allow_amplify,
        )

    def tally(self, algorithm: Algorithm1, samples: int, more: int = 0) -> Tally:
        """Votes of the first ``samples`` samples, batch by batch, resumed where the progress file stops.

        ``more``: how many votes may come after these. InputError or JobError for a sample that can't vote; those
        before it are counted.
        """
        tally = self._counted(algorithm, samples)
        dtype = latent_dtype(self.denoiser)
        drawn = self.sampler.steps if self.sampler.draws_noise else 0
        self.on_total((samples - tally.samples + more) * self.sampler.steps)
        for start in range(tally.samples, samples, self.batch_size):
            indices = range(start, min(start + self.batch_size, samples))
            noise = trajectory_noise(self.seed, indices, drawn, self.denoiser.latent_shape, dtype)
            context = self.prompted.context_of(indices)
            try:
                batch = tally_batch(
                    self.denoiser,
                    self.labels[start : indices.stop],
                    noise.to(self.labels.device),
                    self.sampler,
                    self.guidance,
                    self.eps_scale,
                    algorithm,
                    self.on_step,
                    context,
                    self.float8_of,
                )
            except SampleError as fault:
                raise error_of(indices, fault, self.labels, self.prompted.prompts) from fault.__cause__
            tally.add(batch)
            self.progress.write(_key(algorithm, samples), tally)
        return tally

    def _counted(self, algorithm: Algorithm1, samples: int) -> Tally:
        """The tally that the file has of these votes, or of those of the first few, which a search counted."""
        tally = self.progress.read(_key(algorithm, samples), self.sampler.steps)
        if tally.samples == 0 and samples > self.few:
            tally = self.progress.read(_key(algorithm, self.few), self.sampler.steps)
        return tally

    def cost(self) -> float:
        """Cost of one sample's vote in uncached samplings, by MACs; the paper says about 1.5."""
        steps, costs = self.sampler.steps, self.costs
        tried = max(0, steps - KEEP_FIRST - KEEP_LAST)
        original = costs[StepType.NO_CACHE]
        return 1 + tried * (sum(costs.values()) - original) / (steps * original)

    def options(self) -> Options:
        """The choices that the votes depend on and a table does not state elsewhere, thresholds apart."""
        choices = asdict(self.algorithm)
        del choices["a"], choices["k"]
        return choices | options_of(
            labels=self.labels,
            prompted=self.prompted,
            guidance=self.guidance,
            eps_scale=self.eps_scale,
            seed=self.seed,
            batch_size=self.batch_size,
            fp8=self.float8_of is not None,
        )

    def identity(self) -> dict[str, Any]:
        """Fields that tell this call from another: the model's sizes, the sampler, how many samples vote, prompts."""
        return identity_of(len(self.labels), self.prompted, self.denoiser.shape, self.spec)

    def _times(self, factor: float) -> Algorithm1:
        return replace(self.algorithm, a=self.algorithm.a * factor, k=self.algorithm.k * factor)


def _key(algorithm: Algorithm1, samples: int) -> str:
    """Votes by thresholds and number of samples, which decide them within one call."""
    return f"a={algorithm.a!r} k={algorithm.k!r} samples={samples}"
