"""Algorithm 1 against a slow one: a sample at a time, each with caches of its own in plain lists."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    Kept,
    alpha_bars,
    empty_cache,
    naive_predict,
    naive_timesteps,
    naive_update,
    tiny_dit,
)
from torch import Tensor

from ebcache_fast.algorithm1 import Algorithm1, Tally, tally_batch
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT, DiTDenoiser
from ebcache_fast.plan import StepType
from ebcache_fast.samplers import make_sampler, trajectory_noise

STEPS = 9
LABELS = torch.tensor([0, 3, 3, 1, 4, 2])
SCALE = 0.9  # far enough from 1 that comparing scaled with unscaled shows
FULL, ATTENTION, ATTN_MLP = ([pair] * 2 for pair in ((False, False), (True, False), (True, True)))


@cache
def model() -> DiT:
    return tiny_dit(4)


@dataclass(frozen=True)
class SlowTally:
    votes: list[list[int]]  # by step: NO_CACHE, ATTENTION, ATTN_MLP
    errors: list[list[float]]


def slow_error(algorithm: Algorithm1, original: Tensor, candidate: Tensor) -> float:
    """How far a candidate's eps is from the original's, element by element."""
    b = SCALE if algorithm.compare_scaled else 1.0
    left, right = (b * original).flatten().tolist(), (SCALE * candidate).flatten().tolist()

    def norm(values: list[float]) -> float:
        squares = sum(value * value for value in values)
        return math.sqrt(squares / len(values) if algorithm.norm == "rms" else squares)

    if algorithm.criterion == "norm":
        return abs(norm(left) - norm(right))
    return norm([one - other for one, other in zip(left, right, strict=True)])


def copied(kept: tuple[Kept, Kept]) -> tuple[Kept, Kept]:
    return [list(slots) for slots in kept[0]], [list(slots) for slots in kept[1]]


@torch.no_grad()
def slow_tally(algorithm: Algorithm1, noise: Tensor, sampler: str, cfg_scale: float) -> SlowTally:
    tally = SlowTally([[0, 0, 0] for _ in range(STEPS)], [[0.0, 0.0, 0.0] for _ in range(STEPS)])
    timesteps = naive_timesteps(STEPS)
    bars = alpha_bars(timesteps)
    for n in range(len(LABELS)):
        y, x = LABELS[n : n + 1], noise[0, n : n + 1]
        kept = empty_cache(model()), empty_cache(model())
        run = 0
        for step, t in enumerate(timesteps):
            fresh = copied(kept)
            original, v = naive_predict(model(), x, t, y, FULL, fresh, cfg_scale, 3)
            choice, chosen = 0, fresh
            if 2 <= step <= STEPS - 2:
                threshold = algorithm.a + algorithm.k * (STEPS - 1 - step) / STEPS
                for column, reuse in ((1, ATTENTION), (2, ATTN_MLP)):
                    trial = copied(kept)
                    candidate, _ = naive_predict(model(), x, t, y, reuse, trial, cfg_scale, 3)
                    error = slow_error(algorithm, original, candidate)
                    tally.errors[step][column] += error
                    if error < threshold and (algorithm.max_run is None or run < algorithm.max_run):
                        choice, chosen = column, trial
            kept = chosen
            run = run + 1 if choice else 0
            tally.votes[step][choice] += 1
            step_noise = noise[step + 1, n : n + 1] if sampler == "ddpm" else None
            x = naive_update(sampler, x, SCALE * original, v, step_noise, bars[step], bars[step + 1])
    return tally


def tally_of(algorithm: Algorithm1, noise: Tensor, sampler: str, cfg_scale: float) -> Tally:
    return tally_batch(
        DiTDenoiser(model()), LABELS, noise, make_sampler(sampler, STEPS), Guidance(cfg_scale), SCALE, algorithm
    )


def noise_for(sampler: str) -> Tensor:
    drawn = STEPS if sampler == "ddpm" else 0
    return trajectory_noise(11, range(len(LABELS)), drawn, (4, 8, 8), torch.float64)


def thresholds(criterion: str, norm: str) -> tuple[float, float]:
    """(a, k) at which this model's samples disagree; an L2 norm of 256 elements is 16 RMS norms."""
    a, k = (0.45, 0.5) if criterion == "vector" else (0.08, 0.15)
    return (16 * a, 16 * k) if norm == "l2" else (a, k)


@pytest.mark.parametrize(("sampler", "cfg_scale"), [("ddpm", 1.5), ("ddim", 1.0), ("ddim", 2.0)])
@pytest.mark.parametrize("max_run", [None, 2])
@pytest.mark.parametrize("compare_scaled", [True, False])
@pytest.mark.parametrize(("criterion", "norm"), list(product(("vector", "norm"), ("rms", "l2"))))
def test_votes_and_errors_equal_the_slow_ones(
    criterion: str, norm: str, compare_scaled: bool, max_run: int | None, sampler: str, cfg_scale: float
) -> None:
    a, k = thresholds(criterion, norm)
    algorithm = Algorithm1(
        a=a, k=k, criterion=criterion, norm=norm, compare_scaled=compare_scaled, max_run=max_run
    )
    noise = noise_for(sampler)
    fast, slow = tally_of(algorithm, noise, sampler, cfg_scale), slow_tally(algorithm, noise, sampler, cfg_scale)
    assert fast.votes.tolist() == slow.votes
    np.testing.assert_allclose(fast.errors, slow.errors, rtol=1e-9, atol=0)
    assert fast.samples == len(LABELS)
    print(criterion, norm, compare_scaled, max_run, sampler, cfg_scale, slow.votes, [[round(e,2) for e in r] for r in slow.errors])
