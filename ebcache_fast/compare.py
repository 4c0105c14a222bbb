"""Methods side by side: same labels, same noise, interleaved in one process, judged by the same features."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ebcache_fast.engine.guidance import GUIDED_CHANNELS
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.policies import fora_at_cost
from ebcache_fast.quality import (
    FeatureExtractor,
    Features,
    Reference,
    Scores,
    jackknife_error,
    paired_error,
    score,
)
from ebcache_fast.samplers import make_sampler
from ebcache_fast.sampling import DEFAULT_CFG_SCALE, sample


@dataclass(frozen=True)
class Method:
    """A way to sample: a name for people, the plan, and the sampler's name."""

    name: str
    plan: Plan
    sampler: str = "ddpm"


@dataclass(frozen=True)
class Run:
    """What one method made, and the seconds that each batch took."""

    images: Tensor  # (N, C, H, W)
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """One method's cost and quality over n samples, beside the first method's.

    macs: multiply-accumulates of one sample's run, one guidance branch. speedup: the median over batches of the first
    method's time over this one's; mac_limit: what the MACs allow. paired_error: mean relative RMS difference from the
    first method's sample of the same noise. spread: standard errors by delete-one-group jackknife; for the speed-up
    its lowest and highest batch.
    """

    name: str
    step_types: tuple[str, ...]
    eps_scale: float
    macs: int
    mac_limit: float
    seconds: float
    speedup: float
    paired_error: float
    scores: Scores
    spread: dict[str, float]


def equal_cost_methods(shape: ModelShape, cached: Sequence[tuple[str, Plan]], sampler: str = "ddpm") -> list[Method]:
    """No caching first, then each named plan followed by FORA, and by fewer steps, at its cost."""
    timesteps = cached[0][1].timesteps
    branches = cached[0][1].branches
    uncached = Plan.uncached(timesteps, shape.depth, branches)
    methods = [Method(f"No cache, {len(timesteps)} steps", uncached, sampler)]
    for name, plan in cached:
        steps = max(1, round(len(timesteps) / plan.mac_limit(shape)))
        fewer = Plan.uncached(make_sampler(sampler, steps).timesteps, shape.depth, branches)
        methods += [
            Method(name, plan, sampler),
            Method("FORA at its cost", fora_at_cost(timesteps, plan.macs(shape), shape), sampler),
            Method(f"{steps} steps", fewer, sampler),
        ]
    return methods


def run_methods(
    model: nn.Module,
    methods: Sequence[Method],
    labels: Tensor,
    *,
    cfg_scale: float = DEFAULT_CFG_SCALE,
    guided_channels: int = GUIDED_CHANNELS,
    seed: int = 0,
    batch_size: int = 52,
    on_step: Callable[[int], None] | None = None,
) -> list[Run]:
    """Sample every label (N,) by every method; within a batch the methods take turns, so that all share its moment.

    Raises InputError where there is no method, and as `sample` does.
    """
    if not methods:
        raise InputError("no method was given; name at least one, the first being the one to compare with")
    run = partial(sample, model, cfg_scale=cfg_scale, guided_channels=guided_channels, seed=seed, batch_size=batch_size)
    run(labels[:batch_size], steps=2)  # first calls set up kernels: not timed
    images: list[list[Tensor]] = [[] for _ in methods]
    seconds: list[list[float]] = [[] for _ in methods]
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        for m, method in enumerate(methods):
            began = time.perf_counter()
            made = run(part, table=method.plan, sampler=method.sampler, first_index=start, on_step=on_step).cpu()
            seconds[m].append(time.perf_counter() - began)
            images[m].append(made)
    return [Run(torch.cat(i), tuple(s)) for i, s in zip(images, seconds, strict=True)]


def judge_runs(
    model: nn.Module,
    methods: Sequence[Method],
    runs: Sequence[Run],
    labels: Tensor,
    judge: FeatureExtractor,
    reference: Reference,
    groups: int = 8,
) -> list[Result]:
    """A Result for each method; the first is the one that speed-ups and paired errors refer to."""
    shape = as_denoiser(model).shape
    baseline = runs[0]
    base_macs = methods[0].plan.macs(shape)
    results = []
    for method, run in zip(methods, runs, strict=True):
        features = judge(run.images)
        ratios = [b / s for b, s in zip(baseline.seconds, run.seconds, strict=True)]
        errors = paired_error(run.images, baseline.images)
        macs = method.plan.macs(shape)
        spread = _jackknife_scores(features, labels, reference, groups)
        spread |= {"speedup_low": min(ratios), "speedup_high": max(ratios)}
        spread["paired_error"] = float(errors.std() / len(errors) ** 0.5)
        results.append(
            Result(
                name=method.name,
                step_types=tuple(step.type_name for step in method.plan.steps),
                eps_scale=method.plan.eps_scale,
                macs=macs,
                mac_limit=base_macs / macs,
                seconds=sum(run.seconds),
                speedup=statistics.median(ratios),
                paired_error=float(errors.mean()),
                scores=score(features, labels, reference),
                spread=spread,
            )
        )
    return results


def _jackknife_scores(features: Features, labels: Tensor, reference: Reference, groups: int) -> dict[str, float]:
    """The standard error of each score, from leaving out one of ``groups`` groups of samples at a time."""
    group = torch.arange(len(labels)) % groups
    left_out = [score(_select(features, group != g), labels[group != g], reference) for g in range(groups)]
    names = ("fd_semantic", "fd_texture", "recognised", "contrast", "precision", "recall")
    return {name: jackknife_error([getattr(scores, name) for scores in left_out]) for name in names}


def _select(features: Features, rows: Tensor) -> Features:
    return Features(
        semantic=features.semantic[rows],
        texture=features.texture[rows],
        logits=features.logits[rows],
        contrast=features.contrast[rows],
    )
