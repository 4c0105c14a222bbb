"""Samplers against textbook formulas in float64 and diffusers' schedulers; guidance; per-sample noise."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.ops.operands import GuidanceArgs
from ebcache_fast.ops.reference import guide_and_scale
from ebcache_fast.ops.update import sampler_update
from ebcache_fast.samplers import (
    SAMPLERS,
    Sampler,
    StepRow,
    ddim,
    ddim_over,
    ddpm,
    ddpm_over,
    dpm_solver,
    make_sampler,
    sampler_over,
    trajectory_noise,
)
from ebcache_fast.samplers.schedule import NoiseSchedule, ddim_timesteps, respaced_timesteps, solver_timesteps

STEP_COUNTS = [20, 33, 50, 100, 250]
LINEAR = NoiseSchedule.linear()


def draw(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 5, 5, generator=generator, dtype=dtype) for _ in range(count)]


def alpha_bars(timesteps: tuple[int, ...]) -> list[float]:
    """alpha_bar of each executed timestep and, last, 1: from the definition, without the code under test."""
    by_t, product = [], 1.0
    for t in range(1000):
        product *= 1.0 - (1e-4 + (2e-2 - 1e-4) * t / 999)
        by_t.append(product)
    return [by_t[t] for t in timesteps] + [1.0]


# ---------------------------------------------------------------------------------------- textbook formulas


def textbook_ddpm(x: Tensor, eps: Tensor, v: Tensor, noise: Tensor, ab: list[float], i: int) -> Tensor:
    """Predict x_0, take the posterior mean, add noise of the interpolated variance."""
    here, there = ab[i], ab[i + 1]
    beta = 1.0 - here / there
    x0 = (x - math.sqrt(1.0 - here) * eps) / math.sqrt(here)
    mean = (math.sqrt(there) * beta * x0 + math.sqrt(1.0 - beta) * (1.0 - there) * x) / (1.0 - here)
    if i == len(ab) - 2:
        return mean
    low, high = math.log(beta * (1.0 - there) / (1.0 - here)), math.log(beta)
    share = (v + 1.0) / 2.0
    return mean + torch.exp(0.5 * (share * high + (1.0 - share) * low)) * noise


def textbook_ddim(x: Tensor, eps: Tensor, noise: Tensor, ab: list[float], i: int, eta: float, b: float) -> Tensor:
    """Scale eps, predict x_0 from it, derive eps again from that x_0, step: the scale reaches both terms."""
    here, there = ab[i], ab[i + 1]
    x0 = (x - math.sqrt(1.0 - here) * (b * eps)) / math.sqrt(here)
    derived = (x - math.sqrt(here) * x0) / math.sqrt(1.0 - here)
    sigma = eta * math.sqrt((1.0 - there) / (1.0 - here)) * math.sqrt(1.0 - here / there)
    return math.sqrt(there) * x0 + math.sqrt(1.0 - there - sigma**2) * derived + sigma * noise


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddpm_equals_the_textbook(steps: int) -> None:
    sampler = ddpm(LINEAR, steps)
    ab = alpha_bars(sampler.timesteps)
    x, eps, v, noise = draw(4)
    for i in range(steps):
        expected = textbook_ddpm(x, eps, 2.0 * v, noise, ab, i)  # v beyond [-1, 1] too
        torch.testing.assert_close(
            sampler_update(x, eps, 2.0 * v, noise, sampler.rows[i]), expected, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("b", [1.0, 0.955, 1.036])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_equals_the_textbook_for_scaled_eps(steps: int, eta: float, b: float) -> None:
    sampler = ddim(LINEAR, steps, eta)
    ab = alpha_bars(sampler.timesteps)
    x, eps, v, noise = draw(4)
    for i in range(steps):
        expected = textbook_ddim(x, eps, noise, ab, i, eta, b)
        # The variance output must have no say in DDIM, so random values are given for it.
        torch.testing.assert_close(
            sampler_update(x, b * eps, v, noise, sampler.rows[i]), expected, rtol=1e-10, atol=1e-10
        )


def test_scaling_eps_in_only_one_ddim_term_would_be_seen() -> None:
    sampler = ddim(LINEAR, 50)
    ab = alpha_bars(sampler.timesteps)
    x, eps = draw(2)
    b, i = 0.955, 25
    x0 = (x - math.sqrt(1.0 - ab[i]) * b * eps) / math.sqrt(ab[i])
    unscaled_direction = math.sqrt(ab[i + 1]) * x0 + math.sqrt(1.0 - ab[i + 1]) * eps
    ours = sampler_update(x, b * eps, None, None, sampler.rows[i])
    assert (ours - unscaled_direction).abs().max() > 1e-2


@pytest.mark.parametrize("over", [ddpm_over, ddim_over])
def test_a_perfect_denoiser_recovers_the_data(over) -> None:
    # With the true eps of x = sqrt(ab) x_0 + sqrt(1-ab) eps at each step, the last step gives x_0 itself.
    sampler = over(LINEAR.respace((999, 500, 20, 3)))
    ab = alpha_bars(sampler.timesteps)
    data, x, v, noise = draw(4)
    for i in range(sampler.steps):
        eps = (x - math.sqrt(ab[i]) * data) / math.sqrt(1.0 - ab[i])
        x = sampler_update(x, eps, v, noise, sampler.rows[i])
    torch.testing.assert_close(x, data, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ diffusers


def oracle_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_ddpm_equals_diffusers(steps: int) -> None:
    # Every executed step from the same random x, eps and variance, in float32; the scheduler draws its noise
    # from a generator, and we draw the same numbers from one with the same seed. The scheduler keeps its
    # alpha_bar in float32 and takes beta = 1 - ratio of two of them, which costs it up to 3e-5 in the noise
    # of the last steps. So it is compared twice: as it is, and within 1e-6 with alpha_bar in float64.
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DDPMScheduler(
        variance_type="learned_range", beta_schedule="linear", clip_sample=False, timestep_spacing="linspace"
    )
    oracle.set_timesteps(steps)
    precise = copy.deepcopy(oracle)
    precise.alphas_cumprod = torch.tensor(alpha_bars(tuple(range(1000)))[:-1], dtype=torch.float64)
    sampler = ddpm(LINEAR, steps)
    assert sampler.timesteps == tuple(oracle.timesteps.tolist())
    for i, t in enumerate(oracle.timesteps):
        x, eps, v = draw(3, seed=i, dtype=torch.float32)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 + i))
        ours = sampler_update(x, eps, v, noise, sampler.rows[i])
        for scheduler, tolerance in ((oracle, 5e-5), (precise, 1e-6)):
            generator = torch.Generator().manual_seed(1000 + i)
            theirs = scheduler.step(torch.cat((eps, v), dim=1), t, x, generator=generator).prev_sample
            assert theirs.dtype == torch.float32
            assert oracle_error(ours, theirs) < tolerance, (i, int(t))


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_ddim_equals_diffusers_at_integer_strides(steps: int, eta: float) -> None:
    # diffusers' DDIM always leads to timestep t - 1000 // steps, which is the next executed one only with
    # "leading" spacing: we run on its timesteps. Same x, eps and noise, float32.
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="leading")
    oracle.set_timesteps(steps)
    sampler = ddim_over(LINEAR.respace(oracle.timesteps.tolist()), eta)
    for i, t in enumerate(oracle.timesteps.tolist()):
        x, eps, noise = draw(3, seed=i, dtype=torch.float32)
        theirs = oracle.step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
        assert oracle_error(sampler_update(x, eps, None, noise, sampler.rows[i]), theirs) < 1e-6, (i, t)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_ddim_equals_diffusers_at_fractional_strides(steps: int, eta: float) -> None:
    # For our own default spacing the oracle gets the alpha_bars (from their definition) of the executed
    # steps, as if they were a training schedule of that length, so that its stride is 1. Else as above.
    diffusers = pytest.importorskip("diffusers")
    sampler = ddim(LINEAR, steps, eta)
    oracle = diffusers.DDIMScheduler(num_train_timesteps=steps, clip_sample=False)
    oracle.set_timesteps(steps)
    oracle.alphas_cumprod = torch.tensor(alpha_bars(sampler.timesteps)[-2::-1], dtype=torch.float64)
    for i in range(steps):
        x, eps, noise = draw(3, seed=i, dtype=torch.float32)
        theirs = oracle.step(eps, steps - 1 - i, x, eta=eta, variance_noise=noise).prev_sample
        assert oracle_error(sampler_update(x, eps, None, noise, sampler.rows[i]), theirs) < 1e-6, i


@pytest.mark.parametrize("steps", [20, 50, 100, 250])
def test_integer_spacing_equals_diffusers_leading(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DDPMScheduler(beta_schedule="linear", timestep_spacing="leading")
    oracle.set_timesteps(steps)
    assert ddim_timesteps(1000, steps) == tuple(oracle.timesteps.tolist())


# --------------------------------------------------------------------------------------- update and Sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", [ddpm(LINEAR, 10), ddim(LINEAR, 10, 0.5)], ids=lambda s: s.name)
def test_update_takes_a_numpy_or_a_tensor_row_and_keeps_the_dtype(sampler: Sampler, dtype: torch.dtype) -> None:
    x, eps, v, noise = draw(4, dtype=dtype)
    before = [tensor.clone() for tensor in (x, eps, v, noise)]
    by_numpy = sampler_update(x, eps, v, noise, sampler.rows[3])
    by_tensor = sampler_update(x, eps, v, noise, torch.tensor(sampler.rows, dtype=dtype)[3])
    assert by_numpy.dtype == by_tensor.dtype == dtype
    torch.testing.assert_close(by_tensor, by_numpy)
    for tensor, old in zip((x, eps, v, noise), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sampler", [ddpm(LINEAR, 10), ddim(LINEAR, 10, 0.5)], ids=lambda s: s.name)
def test_update_takes_other_dtypes_into_that_of_the_latent(sampler: Sampler, other: torch.dtype) -> None:
    x, eps, v, noise = draw(4, dtype=torch.float32)
    eps, v, noise = eps.to(other), v.to(other), noise.to(other)
    ours = sampler_update(x, eps, v, noise, sampler.rows[3])
    assert ours.dtype == torch.float32
    assert torch.equal(ours, sampler_update(x, eps.float(), v.float(), noise.float(), sampler.rows[3]))


def test_without_a_variance_output_the_lower_bound_is_drawn() -> None:
    sampler = ddpm(LINEAR, 10)
    x, eps, noise = draw(3)
    lowest = sampler_update(x, eps, torch.full_like(x, -1.0), noise, sampler.rows[2])
    torch.testing.assert_close(sampler_update(x, eps, None, noise, sampler.rows[2]), lowest, rtol=1e-12, atol=1e-12)


def test_without_noise_the_mean_is_returned() -> None:
    x, eps, v = draw(3)
    row = ddpm(LINEAR, 10).rows[2]
    assert torch.equal(sampler_update(x, eps, v, None, row), sampler_update(x, eps, v, torch.zeros_like(x), row))


def test_the_last_step_adds_no_noise() -> None:
    x, eps, v, noise = draw(4)
    for sampler in (ddpm(LINEAR, 10), ddim(LINEAR, 10, 1.0)):
        assert torch.equal(
            sampler_update(x, eps, v, noise, sampler.rows[-1]),
            sampler_update(x, eps, v, -noise, sampler.rows[-1]),
        )


def test_sampler_describes_itself() -> None:
    sampler = ddpm(LINEAR, 10)
    assert (sampler.name, sampler.steps) == ("ddpm", 10)
    assert sampler.timesteps == respaced_timesteps(1000, 10)
    assert sampler.rows.shape == (10, 6)
    assert sampler.rows.dtype == np.float64
    assert StepRow(*sampler.rows[4]) == sampler.step_rows[4]
    assert not sampler.rows.flags.writeable
    assert StepRow._fields == ("cx", "ce", "min_log", "max_log", "noise_on", "sigma", "cp", "px", "pe")
    assert sampler == ddpm(LINEAR, 10)
    assert hash(sampler) == hash(ddpm(LINEAR, 10))
    assert sampler != ddim(LINEAR, 10)


def test_who_draws_noise() -> None:
    assert ddpm(LINEAR, 10).draws_noise
    assert ddim(LINEAR, 10, 0.5).draws_noise
    assert not ddim(LINEAR, 10).draws_noise
    assert not ddpm(LINEAR, 1).draws_noise  # its only step is its last
    assert not dpm_solver(LINEAR, 10).draws_noise


def test_who_has_a_memory() -> None:
    solver = dpm_solver(LINEAR, 10)
    assert solver.has_memory
    assert solver.rows.shape == (10, 9)
    assert StepRow(*solver.rows[4]) == solver.step_rows[4]
    assert not dpm_solver(LINEAR, 2).has_memory  # its first and its last step are of first order
    assert dpm_solver(LINEAR, 2).rows.shape == (2, 6)


def test_a_sampler_needs_one_row_per_timestep() -> None:
    row = StepRow(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(InputError, match="2 timesteps and 1 rows"):
        Sampler("mine", (5, 0), (row,))
    with pytest.raises(InputError, match="0 timesteps"):
        Sampler("mine", (), ())
    with pytest.raises(InputError, match="2 alpha_bar for 1 steps"):
        Sampler("mine", (5,), (row,), (0.5, 0.9))
    for bad in (math.inf, math.nan):
        with pytest.raises(InputError, match="at timestep 5; give finite"):
            Sampler("mine", (5,), (row._replace(cp=bad),))


def test_samplers_by_name() -> None:
    for name, by_steps, spread in (
        ("ddpm", ddpm, respaced_timesteps),
        ("ddim", ddim, respaced_timesteps),
        ("dpm-solver++", dpm_solver, solver_timesteps),
    ):
        assert make_sampler(name, 20) == by_steps(LINEAR, 20)
        assert make_sampler(name, 20, train_steps=100).timesteps == spread(100, 20)
        chosen = LINEAR.respace((700, 41, 2))
        sampler = sampler_over(name, chosen)
        assert sampler.timesteps == (700, 41, 2)
        assert sampler == SAMPLERS[name].over(chosen)


def test_bad_samplers() -> None:
    with pytest.raises(InputError, match="'euler' is unknown; choose one of ddpm, ddim"):
        make_sampler("euler", 20)
    with pytest.raises(InputError, match="'euler' is unknown"):
        sampler_over("euler", LINEAR)
    with pytest.raises(InputError, match=r"steps=0 is outside \[1, 1000\]"):
        make_sampler("ddpm", 0)
    with pytest.raises(InputError, match=r"steps=1000 is outside \[1, 999\]"):
        make_sampler("dpm-solver++", 1000)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="eta="):
            ddim(LINEAR, 20, eta)


# ------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guidance_changes_only_the_first_channels(channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    cond, uncond = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    out = torch.cat([cond, uncond])
    guide_and_scale(out, GuidanceArgs(torch.tensor([1.5, 0.5], dtype=torch.float64), channels, cond.shape[1], 2))
    expected = 1.5 * cond[:, :channels] - 0.5 * uncond[:, :channels]
    for half, own in zip(out.chunk(2), (cond, uncond), strict=True):
        torch.testing.assert_close(half[:, :channels], 0.5 * expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(half[:, channels:], 0.5 * own[:, channels:])


# ---------------------------------------------------------------------------------------------------- noise

SHAPE = (3, 5, 7)  # 105 numbers a latent: no multiple of any vector width


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    batch = trajectory_noise(7, [4, 0, 9], 3, SHAPE)
    assert batch.shape == (4, 3, *SHAPE)
    assert batch.dtype == torch.float32
    for n, index in enumerate([4, 0, 9]):
        assert torch.equal(trajectory_noise(7, [index], 3, SHAPE)[:, 0], batch[:, n])
    assert torch.equal(trajectory_noise(7, np.array([9, 4]), 3, SHAPE), batch[:, [2, 0]])


def test_fewer_steps_see_the_same_noise() -> None:
    long = trajectory_noise(7, [0, 1], 5, SHAPE)
    for steps in (0, 2):  # 0: the initial latent alone, as a sampler without noise asks for it
        assert torch.equal(trajectory_noise(7, [0, 1], steps, SHAPE), long[: steps + 1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((7, 0), (8, 0)),
        ((7, 0), (7, 1)),
        ((7, 8), (8, 7)),
        ((7, 0), (7 + 2**32, 0)),  # a generator that keeps 32 bits of its seed would repeat itself
        ((1, 2), (1 + 2 * 2**32, 0)),  # so would a seed sequence that joins its words
        ((0, 2**64 - 1), (2**64 - 1, 0)),
    ],
)
def test_different_seeds_or_samples_differ(one: tuple[int, int], other: tuple[int, int]) -> None:
    a, b = (trajectory_noise(seed, [index], 1, SHAPE) for seed, index in (one, other))
    assert (a == b).double().mean() < 0.05


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = trajectory_noise(3, range(200), 2, SHAPE).double()  # 63,000 numbers: 5 sigma is 0.02
    assert noise.mean().abs() < 0.02
    assert (noise.var() - 1.0).abs() < 0.03
    steps = torch.corrcoef(noise.flatten(1))  # (3, 3)
    assert (steps - torch.eye(3)).abs().max() < 0.04
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean()
    assert neighbours.abs() < 0.02


def test_noise_has_the_same_values_in_every_dtype() -> None:
    single = trajectory_noise(7, [0, 1], 1, SHAPE)
    double = trajectory_noise(7, [0, 1], 1, SHAPE, torch.float64)
    assert double.dtype == torch.float64
    assert torch.equal(double, single.double())


def test_an_empty_batch_has_no_noise() -> None:
    assert trajectory_noise(7, [], 2, SHAPE).shape == (3, 0, *SHAPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, [0], 1, SHAPE), r"seed=-1 is outside \[0, 2\*\*64\)"),
        ((2**64, [0], 1, SHAPE), "seed=18446744073709551616"),
        ((0, [0, -3], 1, SHAPE), "sample index=-3"),
        ((0, [0], -1, SHAPE), "steps=-1"),
        ((0, [0], 1, (3, -1, 2)), "negative extent"),
    ],
)
def test_bad_noise_arguments(arguments: tuple[int, list[int], int, tuple[int, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trajectory_noise(*arguments)
