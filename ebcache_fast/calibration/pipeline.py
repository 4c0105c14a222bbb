"""``calibrate`` for modules and, with prompts or labels, for diffusers' pipelines as their callers run them."""

import inspect
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from ebcache_fast.calibration import search
from ebcache_fast.calibration.capture_call import capture_call
from ebcache_fast.calibration.samples import Prompted, shown
from ebcache_fast.calibration.voting import SEARCH_SAMPLES
from ebcache_fast.dropin.diffusers_signatures import signature_of
from ebcache_fast.dropin.enable import module_of
from ebcache_fast.dropin.signatures import ForwardCall
from ebcache_fast.errors import EBCacheError, InputError, JobError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.samplers import sampler_of

_DECIDED = ("sampler", "guided_channels", "prompted")  # among the options: by the pipeline
_NOT_OF_A_CALL = {  # what stands elsewhere, or would change what the table is for
    "prompt": "pass prompts",
    "num_inference_steps": "pass steps",
    "guidance_scale": "pass cfg_scale",
    "timesteps": "the scheduler's are taken",
    "sigmas": "the scheduler's are taken",
    "eta": "the scheduler's own noise is taken",
    "use_dynamic_cfg": "guidance is constant here",
}


def calibrate(
    model: Any,
    *,
    prompts: Sequence[str] | None = None,
    call: Mapping[str, Any] | None = None,
    **options: Any,
) -> CacheTable:
    """Make a Cache Table by Algorithm 1 (arXiv 2503.07120) for a module, or for a pipeline of diffusers.

    A pipeline's scheduler says the sampler, and its own defaults the number of steps, the guidance scale and the size:
    the table then has the timesteps that the pipeline will run. Compared is whatever the model predicts.

    Args:
        model: a class-conditional DiT, a DiTPipeline, PixArtSigmaPipeline, PixArtAlphaPipeline or CogVideoXPipeline.
        prompts: of the last three, which the samples take in turn; there are as many samples unless ``samples`` says
            otherwise, one at a time unless ``batch_size`` does.
        call: further arguments of the pipeline's call, such as height, width, num_frames and negative_prompt.
        options: as for `ebcache_fast.calibration.search.calibrate`.

    Raises:
        InputError: an argument is out of range, or the scheduler does what no sampler of ours does.
        JobError: the progress file is damaged, another call's, or can't be written.
    """
    if isinstance(model, nn.Module):
        if prompts is not None or call is not None:
            raise InputError(f"prompts and call are for pipelines, not for a {type(model).__name__}; pass its pipeline")
        return search.calibrate(model, **options)
    module, usual = module_of(model), inspect.signature(model.__call__).parameters
    _refuse_what_is_decided(model, call or {}, options)
    _refuse_offloaded(model, module)
    denoiser = as_denoiser(module)
    steps = options.pop("steps", usual["num_inference_steps"].default)
    scale = options.pop("cfg_scale", usual["guidance_scale"].default)
    channels, sampler = denoiser.latent_shape[0], sampler_of(model.scheduler, steps)
    settled: dict[str, Any] = {"cfg_scale": scale, "guided_channels": channels, "sampler": sampler, "steps": steps}
    if denoiser.num_classes > 1:
        if prompts is not None or call is not None:
            raise InputError(f"{type(model).__name__} takes labels; pass labels in place of prompts and call")
        return search.calibrate(module, **(options | settled))
    if not prompts or isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"prompts={prompts!r} must be a list of one or more for {type(model).__name__}")
    run = dict(call or {}) | {"num_inference_steps": steps, "guidance_scale": scale}
    by_prompt: dict[str, Any] = {
        "samples": len(prompts),
        "batch_size": 1,
    }
    options = by_prompt | options
    first = min(options["batch_size"], options["samples"])
    options["prompted"] = _prompted(model, tuple(prompts), run, max(1, first))
    return search.calibrate(module, **(options | settled))


def _refuse_what_is_decided(pipe: Any, call: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise InputError for arguments that would be overruled, or make the table of another run than it is for."""
    for name in _DECIDED:
        if name in options:
            raise InputError(f"{name}={options[name]!r} is decided by the {type(pipe).__name__}; leave it out")
    for name, instead in _NOT_OF_A_CALL.items():
        if name in call:
            raise InputError(f"call has {name}={call[name]!r}, which can't be chosen there; {instead}, leave it out")


def _refuse_offloaded(pipe: Any, module: nn.Module) -> None:
    """Raise InputError where weights lie elsewhere than the pipeline runs: hooks that fetch them would not be asked."""
    lie_on, runs_on = {weight.device.type for weight in module.parameters()}, pipe._execution_device.type
    if lie_on != {runs_on}:
        raise InputError(
            f"the {type(pipe).__name__} runs on {runs_on}, and weights of its transformer lie on "
            f"{' and '.join(sorted(lie_on))}, as offloading leaves them; calibrate first, and offload afterwards"
        )


def _prompted(pipe: Any, prompts: tuple[str, ...], run: Mapping[str, Any], first: int) -> Prompted:
    """Prompts as the pipeline hands them on, batch by batch, the first of ``first`` samples; each is encoded once."""
    channels = as_denoiser(pipe.transformer).out_channels
    encoded = lru_cache(maxsize=SEARCH_SAMPLES)(lambda samples: _encoded(pipe, prompts, samples, run))

    def batch(samples: range) -> tuple[int, ...]:
        return tuple(k % len(prompts) for k in samples)

    latents = tuple(encoded(batch(range(first))).x.shape[1:])
    if latents[0] > channels:
        raise InputError(
            f"{type(pipe).__name__} gives its transformer more than latents, {latents[0]} channels for {channels}; "
            "calibrate the text-to-video pipeline of the same kind, and use its table"
        )
    checksum = zlib.crc32(repr((list(prompts), sorted(run.items(), key=str))).encode())
    return Prompted(latents, lambda samples: encoded(batch(samples)).context, checksum, prompts)


def _encoded(pipe: Any, prompts: tuple[str, ...], samples: tuple[int, ...], run: Mapping[str, Any]) -> ForwardCall:
    """The call that the pipeline makes of its transformer for these prompts, the conditional rows first.

    InputError or JobError, naming the prompt, where a text can't be encoded or is not finite.
    """
    texts = [prompts[k] for k in samples]
    try:
        seen = capture_call(pipe, prompt=texts, **run)
    except EBCacheError:
        raise
    except Exception as error:
        raise JobError(
            f"sample {' and '.join(f'{k}, prompt {shown(prompts, k)}' for k in samples)}: the pipeline raised "
            f"{type(error).__name__}: {error}; a progress_file keeps the samples before: repeat the call"
        ) from error
    copies = 2 if run["guidance_scale"] != 1 else 1
    if len(seen.x) != copies * len(texts):
        raise InputError(
            f"the pipeline has {len(seen.x)} rows for {len(texts)} prompts at guidance_scale="
            f"{run['guidance_scale']}; use 1 for no guidance or more than 1, and one picture a prompt"
        )
    order = torch.arange(len(seen.x), device=seen.x.device)
    if copies == 2 and signature_of(pipe.transformer).unconditional_first:
        order = order.roll(len(texts))
    call = seen._replace(x=seen.x.new_empty(0, *seen.x.shape[1:]), context=cast(Any, seen.context).rows(order))
    if (row := call.row_not_finite()) is not None:
        k = samples[row % len(texts)]
        which = "text" if row < len(texts) else "negative prompt's text"
        raise InputError(
            f"sample {k}, prompt {shown(prompts, k)}: its {which}, as the pipeline encodes it, holds a number that is "
            "not finite; encode in bfloat16 or float32, whose range is wider than float16's, or leave the prompt out"
        )
    return call
