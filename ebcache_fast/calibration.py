"""``calibrate``: run Algorithm 1 over many samples and make a CacheTable of their votes."""

import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from ebcache_fast.algorithm1 import CANDIDATES, KEEP_FIRST, KEEP_LAST, Algorithm1, Tally, tally_batch
from ebcache_fast.cache_table import CacheTable, Provenance, SamplerSpec
from ebcache_fast.calibration_progress import CalibrationProgress
from ebcache_fast.engine.buffers import latent_dtype
from ebcache_fast.engine.guidance import GUIDED_CHANNELS, Guidance
from ebcache_fast.errors import InputError
from ebcache_fast.models import Context, Denoiser, as_denoiser
from ebcache_fast.noise_schedule import TRAIN_STEPS
from ebcache_fast.plan import Plan, StepType
from ebcache_fast.samplers import Sampler, trajectory_noise
from ebcache_fast.sampling import DEFAULT_CFG_SCALE, check_labels, resolve_run

SEARCH_SAMPLES = 64  # a target cost is searched with so many; the table is then made with all
SEARCH_ROUNDS = 12
SEARCH_TOLERANCE = 0.02  # of the target: as near as a table of 50 steps can come
SEARCH_STRIDE = 4.0  # by which the threshold moves until the target is bracketed


@dataclass(frozen=True)
class Prompted:
    """What stands in the place of labels in a model that has none."""

    latents: tuple[int, ...]  # the shape of one
    context_of: Callable[[range], Context]  # of these samples; under guidance of as many unconditional rows after them
    checksum: int  # of whatever it comes from


def calibrate(
    model: nn.Module,
    *,
    samples: int = 1000,
    labels: Sequence[int] | Tensor | None = None,
    prompted: Prompted | None = None,
    steps: int | None = None,
    sampler: str | Sampler = "ddpm",
    cfg_scale: float = DEFAULT_CFG_SCALE,
    guided_channels: int = GUIDED_CHANNELS,
    eps_scale: float = 1.0,
    allow_amplify: bool = False,
    algorithm: Algorithm1 | None = None,
    target_speedup: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress_file: str | os.PathLike[str] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> CacheTable:
    """Make a Cache Table for ``model`` by Algorithm 1 (arXiv 2503.07120), by default as `Algorithm1` says.

    Args:
        samples: how many vote.
        labels: class labels that the samples take in turn; None means every class.
        prompted: instead of labels, for a model of diffusers; `ebcache_fast.calibrate` makes it of prompts.
        target_speedup: find the threshold, a multiple of the algorithm's a and k, whose table the MAC count
            allows this speed-up over no caching, as nearly as a table can; None takes the threshold as it is.
        progress_file: JSON in which finished batches are counted; the same call resumes from it, another
            call's file is refused.
        on_step: called with the number of samples that advanced, after each step of each batch.
        All others: as for `ebcache_fast.sample`.

    Returns:
        The table, bound to the model's sizes, with its options, mean errors and votes in ``made``.

    Raises:
        InputError: an argument is out of range.
        JobError: the progress file is damaged, another call's, or can't be written.
    """
    denoiser = as_denoiser(model)
    if samples < 1 or batch_size < 1:
        raise InputError(
            f"samples={samples} and batch_size={batch_size} must be 1 or more; the paper uses 1000 samples"
        )
    if target_speedup is not None and not 1 <= target_speedup < math.inf:
        raise InputError(f"target_speedup={target_speedup} is outside [1, inf); 1.5 and 2.5 are the paper's")
    classes = check_labels(denoiser, range(denoiser.num_classes) if labels is None else labels)
    if prompted is None:
        prompted = Prompted(denoiser.latent_shape, lambda samples: (), 0)
    denoiser = denoiser.sized(prompted.latents, prompted.context_of(range(1)))
    plan, stepper = resolve_run(denoiser, None, steps, sampler, eps_scale, allow_amplify)
    spec = SamplerSpec(name=stepper.name, steps=stepper.steps, train_steps=TRAIN_STEPS)
    voting = _Voting(
        denoiser=denoiser,
        algorithm=algorithm or Algorithm1(),
        labels=classes[torch.arange(samples, device=classes.device) % len(classes)],
        prompted=prompted,
        sampler=stepper,
        spec=spec,
        guidance=Guidance(float(cfg_scale), guided_channels),
        eps_scale=plan.eps_scale,
        allow_amplify=allow_amplify,
        seed=seed,
        batch_size=batch_size,
        progress=CalibrationProgress(progress_file),
        on_step=on_step,
    )
    voting.progress.open(voting.options() | voting.identity() | {"weights_crc32": _crc32(model)})
    chosen = voting.algorithm if target_speedup is None else voting.find_threshold(target_speedup)
    return voting.table(chosen, len(voting.labels))


@dataclass(frozen=True, kw_only=True)
class _Voting:
    """All that stays the same while thresholds are tried."""

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
    on_step: Callable[[int], None] | None

    def find_threshold(self, target_speedup: float) -> Algorithm1:
        """The algorithm with a and k multiplied by one factor, found by bisection of its logarithm.

        A looser threshold caches more, by and large; the nearest table seen is the one that counts.
        """
        few = min(SEARCH_SAMPLES, len(self.labels))
        too_low, too_high = 0.0, float("inf")  # factors known to cache too little, or enough
        factor = 1.0
        best, best_distance = self.algorithm, float("inf")
        for _ in range(SEARCH_ROUNDS):
            tried = replace(self.algorithm, a=self.algorithm.a * factor, k=self.algorithm.k * factor)
            speedup = self.table(tried, few).plan(self.denoiser.shape).mac_limit(self.denoiser.shape)
            if abs(speedup - target_speedup) < best_distance:
                best, best_distance = tried, abs(speedup - target_speedup)
            if best_distance < SEARCH_TOLERANCE * target_speedup:
                break
            if speedup < target_speedup:
                too_low = factor
            else:
                too_high = factor
            if too_low == 0:
                factor = too_high / SEARCH_STRIDE
            elif math.isinf(too_high):
                factor = too_low * SEARCH_STRIDE
            else:
                factor = math.sqrt(too_low * too_high)
        return best

    def table(self, algorithm: Algorithm1, samples: int) -> CacheTable:
        """The table that the first ``samples`` samples vote for."""
        tally = self.tally(algorithm, samples)
        no_cache, attention, attn_mlp = tally.votes.T.tolist()
        made = Provenance(
            by="ebcache_fast.calibrate",
            source="Algorithm 1 of EB-Cache (arXiv 2503.07120)",
            options=self.options()
            | {"a": algorithm.a, "k": algorithm.k, "samples": samples, "samplings_a_sample": round(self.cost(), 3)},
            errors={
                "ATTENTION": tally.mean_errors(StepType.ATTENTION),
                "ATTN_MLP": tally.mean_errors(StepType.ATTN_MLP),
            },
            votes={"NO_CACHE": tuple(no_cache), "ATTENTION": tuple(attention), "ATTN_MLP": tuple(attn_mlp)},
        )
        return CacheTable(
            self.sampler.timesteps,
            tally.winners(algorithm.max_run),
            eps_scale=self.eps_scale,
            sampler=self.spec,
            model=dict(self.denoiser.shape.fingerprint),
            made=made,
            allow_amplify=self.allow_amplify,
        )

    def tally(self, algorithm: Algorithm1, samples: int) -> Tally:
        """Votes of the first ``samples`` samples, batch by batch, resumed where the progress file stops."""
        key = f"a={algorithm.a!r} k={algorithm.k!r} samples={samples}"
        tally = self.progress.read(key, self.sampler.steps)
        dtype = latent_dtype(self.denoiser)
        drawn = self.sampler.steps if self.sampler.draws_noise else 0
        for start in range(tally.samples, samples, self.batch_size):
            indices = range(start, min(start + self.batch_size, samples))
            noise = trajectory_noise(self.seed, indices, drawn, self.denoiser.latent_shape, dtype)
            batch = tally_batch(
                self.denoiser,
                self.labels[start : indices.stop],
                noise.to(self.labels.device),
                self.sampler,
                self.guidance,
                self.eps_scale,
                algorithm,
                self.on_step,
                self.prompted.context_of(indices),
            )
            tally.add(batch)
            self.progress.write(key, tally)
        return tally

    def cost(self) -> float:
        """What one sample's vote costs in uncached samplings, by MACs; the paper says about 1.5."""
        shape, steps = self.denoiser.shape, self.sampler.steps
        branches = tuple(cost.branch for cost in shape.branches)
        candidates = Plan.from_types(CANDIDATES, range(len(CANDIDATES))[::-1], shape.depth, branches)
        original, *others = candidates.step_macs(shape)
        tried = max(0, steps - KEEP_FIRST - KEEP_LAST)
        return 1 + tried * sum(others) / (steps * original)

    def options(self) -> dict[str, bool | int | float | str | None]:
        """The choices that the votes depend on and a table does not state elsewhere, thresholds apart."""
        choices = asdict(self.algorithm)
        del choices["a"], choices["k"]
        return choices | {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "labels_crc32": zlib.crc32(self.labels.cpu().numpy().tobytes(), self.prompted.checksum),
            "cfg_scale": self.guidance.scale,
            "guided_channels": self.guidance.channels,
            "eps_scale": self.eps_scale,
        }

    def identity(self) -> dict[str, bool | int | float | str | None]:
        """What else tells this call from another: the model's sizes, the sampler, how many samples vote."""
        return {
            **dict(self.denoiser.shape.fingerprint),
            "sampler": self.spec.name,
            "steps": self.spec.steps,
            "samples": len(self.labels),
        }


def _crc32(model: nn.Module) -> int:
    """A checksum of all parameters and buffers: votes of other weights must not be mixed with these."""
    crc = 0
    for tensor in chain(model.parameters(), model.buffers()):
        crc = zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data, crc)
    return crc
