"""Noise that belongs to a sample, not to the batch the sample happens to be in."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ebcache_fast.errors import InputError

_WORD = 2**64


def trajectory_noise(
    seed: int, indices: Sequence[int], steps: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """All the noise of one sampling run, drawn on the CPU: (steps + 1, N, *shape) in `dtype`.

    Entry 0 is the initial latent, entry 1 + i the noise that executed step i adds. Pass steps=0 for a sampler
    that draws none (`Sampler.draws_noise`): entry 0 is then all there is, with the same values.
    indices: the global number of each of the N samples. Sample k's values depend on (seed, k) alone, not on
    the batch, its order or steps. They are drawn in float32 whatever `dtype` is, so that a float64 run starts
    from the same numbers. shape: one latent, (C, H, W).
    Memory: (steps + 1) * N * prod(shape) elements of `dtype`, and one float32 latent besides.
    Raises InputError when seed or an index is outside [0, 2**64), or steps or an extent of shape is negative.
    """
    _check_word("seed", seed, "choose a non-negative 64-bit seed")
    for index in indices:
        _check_word("sample index", index, "number the samples from 0")
    if steps < 0:
        raise InputError(f"steps={steps} is negative; pass the number of executed steps, 0 for no step noise")
    if any(extent < 0 for extent in shape):
        raise InputError(f"shape={shape} has a negative extent; give the (C, H, W) of one latent")
    noise = torch.empty((steps + 1, len(indices), *shape), dtype=dtype)
    for n, index in enumerate(indices):
        stream = _stream(seed, index)
        for i in range(steps + 1):
            noise[i, n] = torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
    return noise


def _stream(seed: int, index: int) -> np.random.Generator:
    # Philox takes both words as its key, so no two (seed, index) share a stream. torch's CPU generator keeps
    # only 32 bits of a seed: one run of 50,000 samples in four would hold twins. SeedSequence([seed, index])
    # joins its entries without their lengths: (1, 2) and (1 + 2 * 2**32, 0) would be the same.
    return np.random.Generator(np.random.Philox(key=np.array([index, seed], dtype=np.uint64)))


def _check_word(name: str, value: int, remedy: str) -> None:
    if not 0 <= value < _WORD:
        raise InputError(f"{name}={value} is outside [0, 2**64); {remedy}")
