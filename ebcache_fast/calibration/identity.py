"""Facts that tell one calibration from another: what its result depends on and a table does not state elsewhere."""

import zlib
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ebcache_fast.calibration.samples import Prompted
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.plan import ModelShape
from ebcache_fast.plan.table import SamplerSpec

Options = dict[str, bool | int | float | str | None]


def options_of(
    *, labels: Tensor, prompted: Prompted, guidance: Guidance, eps_scale: float, seed: int, batch_size: int, fp8: bool
) -> Options:
    """The choices that both methods have."""
    in_float8: Options = {"fp8": True} if fp8 else {}
    return {
        "seed": seed,
        "batch_size": batch_size,
        "labels_crc32": zlib.crc32(labels.cpu().numpy().tobytes(), prompted.checksum),
        "cfg_scale": guidance.scale,
        "guided_channels": guidance.channels,
        "eps_scale": eps_scale,
        **in_float8,
    }


def identity_of(samples: int, prompted: Prompted, shape: ModelShape, spec: SamplerSpec) -> dict[str, Any]:
    """The model's sizes, the sampler, how many samples there are, their prompts."""
    return {
        "samples": samples,
        **{f"prompt {k}": prompt for k, prompt in enumerate(prompted.prompts)},
        **dict(shape.sizes),
        "sampler": spec.name,
        "steps": spec.steps,
    }


def crc32_of(model: nn.Module) -> int:
    """A checksum of all parameters and buffers: what other weights gave must not be mixed with what these do."""
    crc = 0
    for tensor in chain(model.parameters(), model.buffers()):
        crc = zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data, crc)
    return crc
