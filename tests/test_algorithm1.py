"""Algorithm 1 against a slow one: a sample at a time, each with caches of its own in plain lists."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import cycle, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Kept, alpha_bars, empty_cache, naive_predict, naive_stepper, tiny_dit
from torch import Tensor

from ebcache_fast.calibration.algorithm1 import Algorithm1, tally_batch
from ebcache_fast.calibration.tally import Tally
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT, DiTDenoiser
from ebcache_fast.plan import StepType
from ebcache_fast.samplers import sampler_over, trajectory_noise
from ebcache_fast.samplers.schedule import NoiseSchedule

TIMESTEPS = tuple(range(400, -1, -50))  # at low noise a random model's samples differ from step to step
STEPS = len(TIMESTEPS)
LABELS = torch.tensor([0, 3, 3, 1, 4, 2])
SCALE = 0.9  # far enough from 1 that comparing scaled with unscaled shows


@cache
def model() -> DiT:
    net = tiny_dit(4)
    for block in net.blocks:
        block.adaLN_modulation[1].weight.data *= 1.5  # its branches then change faster
    return net


# ------------------------------------------------------------------------------------------ the slow algorithm

FULL, ATTENTION, ATTN_MLP = ([pair] * 2 for pair in ((False, False), (True, False), (True, True)))


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
    bars = alpha_bars(TIMESTEPS)
    for n in range(len(LABELS)):
        y, x = LABELS[n : n + 1], noise[0, n : n + 1]
        kept = empty_cache(model()), empty_cache(model())
        run, advance = 0, naive_stepper(sampler)
        for step, t in enumerate(TIMESTEPS):
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
            x = advance(x, SCALE * original, v, step_noise, bars[step], bars[step + 1])
    return tally


def noise_for(sampler: str) -> Tensor:
    drawn = STEPS if sampler == "ddpm" else 0
    return trajectory_noise(11, range(len(LABELS)), drawn, (4, 8, 8), torch.float64)


def tally_of(algorithm: Algorithm1, sampler: str = "ddim", cfg_scale: float = 1.0, net: DiT | None = None) -> Tally:
    stepper = sampler_over(sampler, NoiseSchedule.linear().respace(TIMESTEPS))
    denoiser = DiTDenoiser(net or model())
    return tally_batch(denoiser, LABELS, noise_for(sampler), stepper, Guidance(cfg_scale), SCALE, algorithm)


# Thresholds (a, k) by criterion and compare_scaled at which this model's samples disagree.
THRESHOLDS = {
    ("vector", True): (0.12, 0.05),
    ("vector", False): (0.15, 0.1),
    ("norm", True): (0.015, 0.02),
    ("norm", False): (0.08, 0.15),
}
RUNS = [("ddpm", 1.5), ("ddim", 1.0), ("dpm-solver++", 2.0)]
CHOICES = product(("vector", "norm"), ("rms", "l2"), (True, False), (None, 2))


@pytest.mark.parametrize(
    ("criterion", "norm", "compare_scaled", "max_run", "sampler", "cfg_scale"),
    [(*choice, *run) for choice, run in zip(CHOICES, cycle(RUNS), strict=False)],
)
def test_votes_and_errors_equal_the_slow_ones(
    criterion: str, norm: str, compare_scaled: bool, max_run: int | None, sampler: str, cfg_scale: float
) -> None:
    unit = 16 if norm == "l2" else 1  # the square root of 4 * 8 * 8 elements
    a, k = (unit * threshold for threshold in THRESHOLDS[criterion, compare_scaled])
    algorithm = Algorithm1(a=a, k=k, criterion=criterion, norm=norm, compare_scaled=compare_scaled, max_run=max_run)
    fast = tally_of(algorithm, sampler, cfg_scale)
    slow = slow_tally(algorithm, noise_for(sampler), sampler, cfg_scale)
    assert fast.votes.tolist() == slow.votes
    np.testing.assert_allclose(fast.errors, slow.errors, rtol=1e-9, atol=0)
    assert fast.samples == len(LABELS)
    assert fast.votes[2:-1].sum(axis=0).min() > 0  # each kind was chosen, so that each way to refresh was seen


# ------------------------------------------------------------------------------------------------ its decisions


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_first_two_and_the_last_step_are_never_cached(sampler: str) -> None:
    tally = tally_of(Algorithm1(a=1e9, k=0, max_run=None), sampler)
    everyone = len(LABELS)
    always, never = [0, 0, everyone], [everyone, 0, 0]
    assert tally.votes.tolist() == [never, never, *[always] * (STEPS - 3), never]
    assert [kind.name for kind in tally.winners(None)] == (["NO_CACHE"] * 2 + ["ATTN_MLP"] * (STEPS - 3) + ["NO_CACHE"])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_too_short_to_cache_are_run_in_full(steps: int) -> None:
    stepper = sampler_over("ddim", NoiseSchedule.linear().respace(TIMESTEPS[:steps]))
    algorithm, denoiser = Algorithm1(a=1e9), DiTDenoiser(model())
    tally = tally_batch(denoiser, LABELS, noise_for("ddim"), stepper, Guidance(1.0), 1.0, algorithm)
    assert tally.winners(3) == [StepType.NO_CACHE] * steps
    assert tally.mean_errors(StepType.ATTN_MLP) == (None,) * steps


def test_a_threshold_below_every_error_caches_nothing_and_is_strict() -> None:
    fresh = DiT(input_size=8, patch_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=5).double()
    nothing = tally_of(Algorithm1(a=0, k=0), net=fresh)  # a fresh model's branches are gated to 0: no error at all
    assert nothing.votes[:, 0].tolist() == [len(LABELS)] * STEPS
    assert nothing.mean_errors(StepType.ATTENTION) == (None, None, *[0.0] * (STEPS - 3), None)
    just = tally_of(Algorithm1(a=1e-300, k=0, max_run=None), net=fresh)
    assert just.votes[2:-1, 2].tolist() == [len(LABELS)] * (STEPS - 3)


def test_the_limit_on_runs_holds_for_every_sample() -> None:
    tally = tally_of(Algorithm1(a=1e9, k=0, max_run=2))
    kinds = [int(column) for column in tally.votes.argmax(axis=1)]
    assert kinds == [0, 0, 2, 2, 0, 2, 2, 0, 0]


def test_the_threshold_rises_with_the_step_index() -> None:
    algorithm = Algorithm1(a=0.05, k=0.15)
    assert [algorithm.threshold(step, 50) for step in (0, 49)] == pytest.approx([0.05 + 0.15 * 49 / 50, 0.05])


def test_mean_errors_are_means_over_the_samples() -> None:
    tally = tally_of(Algorithm1())
    for kind in (StepType.ATTENTION, StepType.ATTN_MLP):
        means = tally.mean_errors(kind)
        assert means[:2] == (None, None)
        assert means[-1] is None
        assert means[2:-1] == pytest.approx(list(tally.errors[2:-1, kind] / len(LABELS)), rel=1e-15)


def test_steps_are_reported_as_they_are_done() -> None:
    heard: list[int] = []
    stepper = sampler_over("ddim", NoiseSchedule.linear().respace(TIMESTEPS))
    denoiser, noise = DiTDenoiser(model()), noise_for("ddim")
    tally_batch(denoiser, LABELS, noise, stepper, Guidance(1.0), 1.0, Algorithm1(), heard.append)
    assert heard == [len(LABELS)] * STEPS


# ------------------------------------------------------------------------------------------------- the election

NO_CACHE, ATTN = StepType.NO_CACHE, StepType.ATTENTION
BOTH = StepType.ATTN_MLP


def elected(votes: list[list[int]], max_run: int | None = None) -> list[StepType]:
    return Tally(np.array(votes), np.zeros((len(votes), 3)), sum(votes[0])).winners(max_run)


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([4, 3, 3], NO_CACHE),
        ([3, 4, 3], ATTN),
        ([3, 3, 4], BOTH),
        ([5, 0, 5], NO_CACHE),
        ([5, 5, 0], NO_CACHE),
        ([0, 5, 5], ATTN),
        ([3, 3, 3], NO_CACHE),
    ],
)
def test_the_majority_wins_and_a_tie_goes_to_the_safer_side(votes: list[int], winner: StepType) -> None:
    assert elected([votes]) == [winner]


def test_the_limit_on_runs_holds_for_the_winners() -> None:
    votes = [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert elected(votes) == [NO_CACHE, BOTH, ATTN, BOTH, BOTH, NO_CACHE, ATTN]
    assert elected(votes, 2) == [NO_CACHE, BOTH, ATTN, NO_CACHE, BOTH, NO_CACHE, ATTN]
    assert elected(votes, 1) == [NO_CACHE, BOTH, NO_CACHE, BOTH, NO_CACHE, NO_CACHE, ATTN]


@given(
    votes=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=30),
    max_run=st.none() | st.integers(1, 4),
)
def test_winners_stand_between_the_votes_and_the_limit(votes: list[list[int]], max_run: int | None) -> None:
    run = 0
    for row, winner in zip(votes, elected(votes, max_run), strict=True):
        run = run + 1 if winner is not NO_CACHE else 0
        assert max_run is None or run <= max_run
        if winner is NO_CACHE:
            assert row[0] == max(row) or max_run is not None
        else:
            assert row[winner] == max(row)
            assert all(safer < row[winner] for safer in row[:winner])


def test_tallies_of_two_batches_add_up() -> None:
    one, other = (Tally(np.full((2, 3), n), np.full((2, 3), 0.5 * n), 3 * n) for n in (1, 2))
    total = Tally.empty(2)
    total.add(one)
    total.add(other)
    assert total.votes.tolist() == [[3] * 3] * 2
    assert total.errors.tolist() == [[1.5] * 3] * 2
    assert total.samples == 9


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"a": math.nan}, "a=nan .* must be finite"),
        ({"k": math.inf}, "k=inf must be finite"),
        ({"criterion": "cosine"}, "criterion='cosine' is unknown; choose vector or norm"),
        ({"norm": "l1"}, "norm='l1' is unknown; choose rms or l2"),
        ({"max_run": 0}, "max_run=0 is below 1"),
    ],
)
def test_choices_of_no_sense_are_refused(choices: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Algorithm1(**choices)
    assert "\n" not in str(caught.value)
