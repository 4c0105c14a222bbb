"""``calibrate``: run Algorithm 1 over many samples and make a CacheTable of their votes."""

import os
import zlib
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ebcache_fast.calibration.algorithm1 import Algorithm1
from ebcache_fast.calibration.progress import CalibrationProgress
from ebcache_fast.calibration.target import check_target, step_costs
from ebcache_fast.calibration.voting import Prompted, Voting
from ebcache_fast.engine.guidance import GUIDED_CHANNELS, Guidance
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan.table import CacheTable, SamplerSpec
from ebcache_fast.samplers import Sampler
from ebcache_fast.samplers.schedule import TRAIN_STEPS
from ebcache_fast.sampling import DEFAULT_CFG_SCALE, check_labels, resolve_run


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
    fp8: bool = False,
    progress_file: str | os.PathLike[str] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> CacheTable:
    """Make a Cache Table for ``model`` by Algorithm 1 (arXiv 2503.07120), by default as `Algorithm1` says.

    Args:
        samples: how many vote.
        labels: class labels that the samples take in turn; None means every class.
        prompted: instead of labels, for a model of diffusers; `ebcache_fast.calibrate` makes it of prompts.
        target_speedup: find a multiple of the algorithm's a and k whose table the MAC count allows this speed-up over
            no caching, or more; the votes that fewest samples cast are then given back until it is as near as a table
            can be. None takes the threshold as it is. A search counts votes of at most 64 samples several times.
        fp8: vote with QKV's and fc1's products in float8, as `EngineOptions` runs them.
        progress_file: JSON in which finished batches are counted; the same call resumes from it, another
            call's file is refused.
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
    algorithm = algorithm or Algorithm1()
    if target_speedup is not None:
        check_target(target_speedup, stepper.steps, algorithm, step_costs(denoiser.shape))
    voting = Voting(
        denoiser=denoiser,
        algorithm=algorithm,
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
        on_step=on_step or _ignore,
        on_total=on_total or _ignore,
        float8_of=model if fp8 else None,
    )
    voting.progress.open(voting.identity() | voting.options() | {"weights_crc32": _crc32(model)})
    return voting.table_of_votes() if target_speedup is None else voting.table_near(target_speedup)


def _ignore(_: int) -> None:
    """Do nothing: nobody listens."""


def _crc32(model: nn.Module) -> int:
    """A checksum of all parameters and buffers: votes of other weights must not be mixed with these."""
    crc = 0
    for tensor in chain(model.parameters(), model.buffers()):
        crc = zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data, crc)
    return crc
