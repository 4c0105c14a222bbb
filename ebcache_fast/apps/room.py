"""Room for a command: the memory that it would hold, checked before any work, so that none ends in the middle."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ebcache_fast.errors import InputError
from ebcache_fast.models import Denoiser
from ebcache_fast.plan import Plan
from ebcache_fast.samplers.schedule import TRAIN_STEPS

MEMINFO = Path("/proc/meminfo")
OF_A_LABEL = 16  # bytes, in a list and in a tensor
OF_A_VALUE = 4  # of a latent: float32
MORE_RUNS = "further runs with other seeds make more"
CPU = torch.device("cpu")


def check_room(name: str, count: int, size: int, remedy: str, device: torch.device = CPU) -> None:
    """Raise InputError, naming the number, its limit and the remedy, if ``count`` times ``size`` bytes can't be had.

    What a system does not say is not held against anybody.
    """
    free = available_bytes(device)
    if free is not None and count * size > free:
        raise InputError(
            f"{name}={count} would hold {count * size / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free; "
            f"ask for at most {free // size}: {remedy}"
        )


def check_run(
    denoiser: Denoiser, samples: int, batch: int, plans: Sequence[Plan], *, draws_noise: bool, cfg_scale: float
) -> None:
    """Raise InputError where sampling by each of ``plans`` would hold more than there is: latents, caches and noise.

    That is the least of it. batch: how many samples run at once.
    """
    latent, rows = _latent_bytes(denoiser), 1 if cfg_scale == 1 else 2
    # Of each batch by itself, and all in one piece.
    check_room("samples", samples, 2 * len(plans) * latent + OF_A_LABEL, MORE_RUNS)
    weight = denoiser.weight()
    batch_bytes = [
        plan.cache_bytes(denoiser.shape, rows, weight.element_size()) + (1 + len(plan) * draws_noise) * latent
        for plan in plans
    ]
    check_room("batch size", min(batch, samples), max(batch_bytes, default=0), "batches run one by one", weight.device)


def check_votes(denoiser: Denoiser, samples: int, batch: int, steps: int, cfg_scale: float) -> None:
    """Raise InputError where a calibration would hold more than there is: labels, and of a batch three caches."""
    check_room("samples", samples, OF_A_LABEL, "the paper uses 1000")
    shape, weight, rows = denoiser.shape, denoiser.weight(), 1 if cfg_scale == 1 else 2
    caches = 3 * rows * len(shape.sites) * shape.slot_elements * weight.element_size()
    batch_bytes = caches + (1 + min(steps, TRAIN_STEPS)) * _latent_bytes(denoiser)
    check_room("batch size", min(batch, samples), batch_bytes, "batches run one by one", weight.device)


def _latent_bytes(denoiser: Denoiser) -> int:
    return OF_A_VALUE * math.prod(denoiser.latent_shape)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and MEMINFO.is_file():
        found = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        if "MemAvailable" in found:
            return int(found["MemAvailable"].split()[0]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
