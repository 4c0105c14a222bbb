"""Methods side by side: same labels, same noise, interleaved in one process, judged by the same features."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ebcache_fast.apps.quality import Judge, Scores, paired_error
from ebcache_fast.engine.guidance import GUIDED_CHANNELS
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.policies import fora_at_cost
from ebcache_fast.samplers import make_sampler
from ebcache_fast.sampling import DEFAULT_CFG_SCALE, sample

MIN_SAMPLES = 32  # a Frechet distance of fewer says nothing
BATCH = 26

Noise = Literal["same", "other steps", "other noise"]


@dataclass(frozen=True)
class Method:
    """A way to sample: a name for people, the plan, and the sampler's name."""

    name: str
    plan: Plan
    sampler: str = "ddpm"


@dataclass(frozen=True)
class Run:
    """Samples of one method, and the seconds that each batch took."""

    images: Tensor  # (N, C, H, W)
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """Cost and quality of one method over n samples, beside the first method's.

    macs: multiply-accumulates of one sample's run, one guidance branch. speedup: the median over batches of the first
    method's time over this one's; mac_limit: what the MACs allow. paired_error: mean relative RMS difference from the
    first method's sample of the same noise. spread: standard errors by delete-one-group jackknife; for the speed-up
    its lowest and highest batch. noise: how far its noise is the first method's: "other noise" is drawn at other
    steps, so that the paired error is not what caching does. scores: None where nobody judged. per_sample: figures of
    each sample, by name.
    """

    name: str
    step_types: tuple[str, ...]
    eps_scale: float
    macs: int
    mac_limit: float
    seconds: float
    speedup: float
    paired_error: float
    scores: Scores | None
    spread: dict[str, float]
    sampler: str
    timesteps: tuple[float, ...]
    noise: Noise
    batch_seconds: tuple[float, ...]
    per_sample: dict[str, tuple[float, ...]]


def equal_cost_methods(shape: ModelShape, cached: Sequence[tuple[str, Plan]], sampler: str = "ddpm") -> list[Method]:
    """No caching first, then each named plan followed by FORA, and by fewer steps, at its cost."""
    timesteps = cached[0][1].timesteps
    uncached = Plan.uncached(timesteps, shape.sites)
    methods = [Method(f"No cache, {len(timesteps)} steps", uncached, sampler)]
    for name, plan in cached:
        steps = max(1, round(len(timesteps) / plan.mac_limit(shape)))
        fewer = Plan.uncached(make_sampler(sampler, steps).timesteps, shape.sites)
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
    batch_size: int = BATCH,
    on_step: Callable[[int], None] | None = None,
) -> list[Run]:
    """Sample every label (N,) by every method; within a batch the methods take turns, so that all share its moment.

    Raises InputError where there is no method, and as `sample` does.
    """
    if not methods:
        raise InputError("no method was given; name at least one, the first being the one to compare with")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is below 1; {BATCH} suits a CPU")
    run = partial(sample, model, cfg_scale=cfg_scale, guided_channels=guided_channels, seed=seed, batch_size=batch_size)
    run(labels[:batch_size], steps=2)  # first calls set up kernels: not timed
    images: list[list[Tensor]] = [[] for _ in methods]
    seconds: list[list[float]] = [[] for _ in methods]
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        for m, method in enumerate(methods):
            began = time.perf_counter()
            samples = run(part, table=method.plan, sampler=method.sampler, first_index=start, on_step=on_step).cpu()
            seconds[m].append(time.perf_counter() - began)
            images[m].append(samples)
    return [Run(torch.cat(i), tuple(s)) for i, s in zip(images, seconds, strict=True)]


def measure(
    model: nn.Module,
    methods: Sequence[Method],
    labels: Sequence[int],
    judge: Judge | None = None,
    *,
    seed: int = 0,
    cfg_scale: float = DEFAULT_CFG_SCALE,
    batch_size: int = BATCH,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[list[Run], list[Result]]:
    """`run_methods`, then `judge_runs`; InputError for no method, or too few samples to judge by.

    ``on_start`` gets the number of sample-steps to come, ``on_step`` how many are done.
    """
    check_count(len(labels), judged=judge is not None)
    y = torch.tensor(labels)
    if on_start is not None:
        on_start(len(labels) * sum(len(method.plan) for method in methods))
    runs = run_methods(model, methods, y, cfg_scale=cfg_scale, seed=seed, batch_size=batch_size, on_step=on_step)
    return runs, judge_runs(model, methods, runs, y, judge)


def check_count(samples: int, *, judged: bool = True) -> None:
    """Raise InputError unless there are enough samples to judge by, or to say how much they spread."""
    if judged and samples < MIN_SAMPLES:
        raise InputError(f"samples={samples} is below {MIN_SAMPLES}; a Frechet distance of so few says nothing")
    if samples < 2:
        raise InputError(f"samples={samples} is below 2; one sample has no spread")


def judge_runs(
    model: nn.Module,
    methods: Sequence[Method],
    runs: Sequence[Run],
    labels: Tensor,
    judge: Judge | None = None,
    groups: int = 8,
) -> list[Result]:
    """A Result for each method; the first is the one that speed-ups and paired errors refer to.

    Without a ``judge`` there are no scores. Raises InputError, naming the method, for samples that are not finite.
    """
    shape = as_denoiser(model).shape
    baseline = runs[0]
    base_macs = methods[0].plan.macs(shape)
    results = []
    for method, run in zip(methods, runs, strict=True):
        ratios = [b / s for b, s in zip(baseline.seconds, run.seconds, strict=True)]
        errors = _paired_error(method, run, baseline)
        judgement = None if judge is None else judge(run.images, labels, groups)
        macs = method.plan.macs(shape)
        spread = {} if judgement is None else dict(judgement.errors)
        spread |= {"speedup_low": min(ratios), "speedup_high": max(ratios)}
        spread["paired_error"] = float(errors.std() / len(errors) ** 0.5)
        per_sample = {} if judgement is None else judgement.per_sample
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
                scores=None if judgement is None else judgement.scores,
                spread=spread,
                sampler=method.sampler,
                timesteps=method.plan.timesteps,
                noise=noise_beside(method, methods[0]),
                batch_seconds=run.seconds,
                per_sample={"paired_error": tuple(errors.tolist()), **per_sample},
            )
        )
    return results


def noise_beside(method: Method, first: Method) -> Noise:
    """Likeness of a method's noise to the first one's, sample by sample.

    All begin with the same; a sampler that draws more of it does so at each of its steps.
    """
    if method.sampler == first.sampler and method.plan.timesteps == first.plan.timesteps:
        return "same"
    draws = any(make_sampler(side.sampler, len(side.plan)).draws_noise for side in (method, first))
    return "other noise" if draws else "other steps"


def _paired_error(method: Method, run: Run, first: Run) -> Tensor:
    """`paired_error` (N,), naming the method in what is wrong."""
    try:
        return paired_error(run.images, first.images)
    except InputError as error:
        raise InputError(f"method {method.name!r}: {error}; leave it out") from None
