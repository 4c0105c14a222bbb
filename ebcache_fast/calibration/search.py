"""``calibrate``: make a CacheTable of what some samples show, by either method."""

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from ebcache_fast.calibration.aim import at_milliseconds, at_speedup
from ebcache_fast.calibration.algorithm1 import Algorithm1
from ebcache_fast.calibration.guided_run import Setting
from ebcache_fast.calibration.identity import crc32_of, identity_of, options_of
from ebcache_fast.calibration.path import PathCalibration
from ebcache_fast.calibration.progress import CalibrationProgress
from ebcache_fast.calibration.samples import Prompted
from ebcache_fast.calibration.target import check_target, step_costs
from ebcache_fast.calibration.voting import Voting
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.guidance import GUIDED_CHANNELS, Guidance
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan.table import CacheTable, SamplerSpec
from ebcache_fast.samplers import Sampler
from ebcache_fast.samplers.schedule import TRAIN_STEPS
from ebcache_fast.sampling import DEFAULT_CFG_SCALE, check_labels, resolve_run

SAMPLES: Final[Mapping[str, int]] = MappingProxyType({"path": 128, "algorithm1": 1000})  # by method, unless said


def calibrate(
    model: nn.Module,
    *,
    method: str | None = None,
    samples: int | None = None,
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
    target_ms: float | None = None,
    step_ms: Mapping[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    fp8: bool = False,
    progress_file: str | os.PathLike[str] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> CacheTable:
    """Make a Cache Table for ``model``: by the path search, or by Algorithm 1 (arXiv 2503.07120).

    Args:
        method: "path" finds the steps to compute for a target, with forecasts between them and corrections of their
            noise, by what it measures along uncached trajectories (`ebcache_fast.calibration.path`). "algorithm1" is
            the paper's, by default as `Algorithm1` says. None means "path", unless ``algorithm`` is given.
        samples: how many are measured, or vote; None means 128, or 1000 of Algorithm 1.
        labels: class labels that the samples take in turn; None means every class.
        prompted: instead of labels, for a model of diffusers; `ebcache_fast.calibrate` makes it of prompts.
        algorithm: the choices of Algorithm 1.
        target_speedup: how much the MAC count is to allow over no caching. The path search computes as many steps as
            come nearest to it; None means 2, or as much as there is. Algorithm 1 finds a multiple of its a and k whose
            table allows so much or more; the votes that fewest samples cast are then given back until it is as near as
            a table can be; None takes its thresholds as they are. It counts votes of 64 samples several times.
        target_ms, step_ms: instead, how many milliseconds a run is to take, and how many its steps of "KEEP" and
            "FORECAST" take, as a profile of a path's table says. Of the path search.
        fp8: run QKV's and fc1's products in float8, as `EngineOptions` runs them.
        progress_file: JSON in which finished batches are counted; the same call resumes from it, another
            call's file is refused. A path's measurement serves every target.
        on_step: called with the number of samples that advanced, after each step of each batch.
        on_total: called with the number of sample-steps to come from now on, at most: first for all of a search, then
            again, as less is left.
        All others: as for `ebcache_fast.sample`.

    Returns:
        The table, bound to the model's sizes, with its options, mean errors and votes in ``made``; there too the
        target, the speed-up reached, and what it cost in uncached samplings by MACs. A target missed by more than 2%
        is logged.

    Raises:
        InputError: an argument is out of range, such as a target beyond what the steps allow, or a sample's output is
            not finite; samples before it are kept in the progress file.
        JobError: the progress file is damaged, another call's, or can't be written.
    """
    denoiser = as_denoiser(model)
    EngineOptions(fp8=fp8).check(denoiser)
    if method is None:
        method = "path" if algorithm is None else "algorithm1"
    if method not in SAMPLES:
        raise InputError(f"method={method!r} is unknown; choose {' or '.join(SAMPLES)}")
    if method == "path" and algorithm is not None:
        raise InputError("algorithm is Algorithm 1's, and method='path' has none; leave one of them out")
    if target_ms is not None and (target_speedup is not None or method != "path"):
        raise InputError("target_ms is for method='path', and in the place of target_speedup; leave one of them out")
    samples = SAMPLES[method] if samples is None else samples
    if samples < 1 or batch_size < 1:
        raise InputError(
            f"samples={samples} and batch_size={batch_size} must be 1 or more; the paper uses 1000 samples"
        )
    classes = check_labels(denoiser, range(denoiser.num_classes) if labels is None else labels)
    if prompted is None:
        prompted = Prompted(denoiser.latent_shape, lambda samples: (), 0)
    denoiser = denoiser.for_shape(prompted.latents, prompted.context_of(range(min(batch_size, samples))))
    plan, stepper = resolve_run(denoiser, None, steps, sampler, eps_scale, allow_amplify)
    spec = SamplerSpec(name=stepper.name, steps=stepper.steps, train_steps=TRAIN_STEPS)
    indices = torch.arange(samples, device=classes.device) % len(classes)
    progress, guidance = CalibrationProgress(progress_file), Guidance(float(cfg_scale), guided_channels)
    common: dict[str, Any] = {
        "labels": classes[indices],
        "prompted": prompted,
        "guidance": guidance,
        "eps_scale": plan.eps_scale,
        "seed": seed,
        "batch_size": batch_size,
    }
    if method == "path":
        if target_ms is None:
            aim = at_speedup(target_speedup, denoiser.shape, stepper.timesteps)
        else:
            aim = at_milliseconds(target_ms, step_ms, stepper.timesteps)
        options = options_of(**common, fp8=fp8)
        identity = identity_of(samples, prompted, denoiser.shape, spec)
        progress.open({"method": "path"} | identity | options | {"weights_crc32": crc32_of(model)})
        setting = Setting(
            engine=Engine(model, EngineOptions(fp8=fp8)),
            denoiser=denoiser,
            labels=common["labels"],
            prompted=prompted,
            sampler=stepper,
            guidance=guidance,
            eps_scale=plan.eps_scale,
            seed=seed,
            on_step=on_step or _ignore,
        )
        return PathCalibration(
            setting=setting,
            spec=spec,
            samples=samples,
            batch_size=batch_size,
            allow_amplify=allow_amplify,
            progress=progress,
            on_total=on_total or _ignore,
            options=options,
        ).table_at(aim)
    algorithm = algorithm or Algorithm1()
    if target_speedup is not None:
        check_target(target_speedup, stepper.steps, algorithm, step_costs(denoiser.shape))
    voting = Voting(
        **common,
        denoiser=denoiser,
        algorithm=algorithm,
        sampler=stepper,
        spec=spec,
        allow_amplify=allow_amplify,
        progress=progress,
        on_step=on_step or _ignore,
        on_total=on_total or _ignore,
        float8_of=model if fp8 else None,
    )
    progress.open(voting.identity() | voting.options() | {"weights_crc32": crc32_of(model)})
    return voting.table_of_votes() if target_speedup is None else voting.table_near(target_speedup)


def _ignore(_: int) -> None:
    """Do nothing: nobody listens."""
