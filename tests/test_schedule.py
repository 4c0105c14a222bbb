"""Schedules and respacing: values worked out by hand, the defining identities, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebcache_fast.errors import InputError
from ebcache_fast.samplers.schedule import (
    NoiseSchedule,
    ddim_timesteps,
    linear_betas,
    respaced_timesteps,
    solver_timesteps,
)

# ------------------------------------------------------------------------------------------------ timesteps


@pytest.mark.parametrize(
    ("train_steps", "steps", "expected"),
    [
        (10, 4, (9, 6, 3, 0)),  # stride 3
        (10, 5, (9, 7, 4, 2, 0)),  # stride 2.25: 0, 2.25, 4.5 (ties to even: 4), 6.75, 9
        (11, 5, (10, 8, 5, 2, 0)),  # stride 2.5: 0, 2.5 (2), 5, 7.5 (8), 10
        (10, 2, (9, 0)),
        (5, 5, (4, 3, 2, 1, 0)),
        (10, 1, (0,)),  # as IDDPM: a single step is timestep 0
        (1, 1, (0,)),
    ],
)
def test_respacing_by_hand(train_steps: int, steps: int, expected: tuple[int, ...]) -> None:
    assert respaced_timesteps(train_steps, steps) == expected


def test_respacing_sums_the_stride_as_iddpm_does() -> None:
    # 999/20 = 49.95, so that entry 10 is a tie at 499.5 in exact arithmetic (to even: 500); the running sum
    # of the floats falls just below it, and IDDPM, hence every table made with it, has 499.
    assert respaced_timesteps(1000, 21)[::-1][10] == 499


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_respacing_keeps_both_ends_and_is_even(data: st.DataObject) -> None:
    train_steps = data.draw(st.integers(2, 1200))
    steps = data.draw(st.integers(2, train_steps))
    timesteps = respaced_timesteps(train_steps, steps)
    assert len(timesteps) == steps
    assert (timesteps[0], timesteps[-1]) == (train_steps - 1, 0)
    gaps = {a - b for a, b in pairwise(timesteps)}
    stride = (train_steps - 1) / (steps - 1)
    assert min(gaps) >= max(1, math.floor(stride) - 1)
    assert max(gaps) <= math.ceil(stride) + 1


@pytest.mark.parametrize(
    ("train_steps", "steps", "expected"),
    [
        (10, 5, (8, 6, 4, 2, 0)),
        (10, 4, (9, 6, 3, 0)),
        (10, 3, (8, 4, 0)),  # stride 4 gives 0, 4, 8
        (10, 2, (5, 0)),  # strides 5 to 9 give two; the smallest counts
        (10, 10, (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
        (10, 1, (0,)),
    ],
)
def test_integer_spacing_by_hand(train_steps: int, steps: int, expected: tuple[int, ...]) -> None:
    assert ddim_timesteps(train_steps, steps) == expected


@pytest.mark.parametrize(
    ("train_steps", "steps", "expected"),
    [
        (10, 3, (9, 6, 3)),
        (10, 4, (9, 7, 4, 2)),  # stride 2.25: 2.25, 4.5 (ties to even: 4), 6.75, 9
        (10, 9, (9, 8, 7, 6, 5, 4, 3, 2, 1)),
        (10, 1, (9,)),
    ],
)
def test_solver_spacing_by_hand(train_steps: int, steps: int, expected: tuple[int, ...]) -> None:
    assert solver_timesteps(train_steps, steps) == expected


@pytest.mark.parametrize("steps", [0, 10])
def test_solver_steps_out_of_range(steps: int) -> None:
    with pytest.raises(InputError, match=rf"steps={steps} is outside \[1, 9\]"):
        solver_timesteps(10, steps)


def test_ddim50() -> None:
    assert ddim_timesteps(1000, 50) == tuple(range(980, -1, -20))


def test_impossible_integer_spacing_names_the_nearest_counts() -> None:
    # Over 10 timesteps, strides 1, 2, 3, 4, 5, 10 give 10, 5, 4, 3, 2 and 1 steps.
    for steps in (6, 7, 8, 9):
        with pytest.raises(InputError, match=rf"steps={steps}.* use 5 or 10,"):
            ddim_timesteps(10, steps)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_integer_spacing_equals_a_search_over_all_strides(data: st.DataObject) -> None:
    train_steps = data.draw(st.integers(1, 300))
    steps = data.draw(st.integers(1, train_steps))
    found = [range(0, train_steps, k) for k in range(1, train_steps + 1)]
    exact = [tuple(reversed(r)) for r in found if len(r) == steps]
    if exact:
        assert ddim_timesteps(train_steps, steps) == exact[0]
    else:
        fewer = max(len(r) for r in found if len(r) < steps)
        more = min(len(r) for r in found if len(r) > steps)
        with pytest.raises(InputError, match=f"use {fewer} or {more},"):
            ddim_timesteps(train_steps, steps)


@pytest.mark.parametrize("spacing", [respaced_timesteps, ddim_timesteps])
@pytest.mark.parametrize("steps", [-1, 0, 11])
def test_steps_out_of_range(spacing, steps: int) -> None:
    with pytest.raises(InputError, match=rf"steps={steps} is outside \[1, 10\]"):
        spacing(10, steps)
    with pytest.raises(InputError, match="train_steps=0"):
        spacing(0, steps)


# ------------------------------------------------------------------------------------------------- schedule


def test_linear_betas() -> None:
    betas = linear_betas()
    assert betas.shape == (1000,)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas[[0, -1]], [1e-4, 2e-2], rtol=1e-15)
    np.testing.assert_allclose(np.diff(betas), (2e-2 - 1e-4) / 999, rtol=1e-9)
    np.testing.assert_allclose(linear_betas(250)[[0, -1]], [4e-4, 8e-2], rtol=1e-15)


def test_linear_betas_too_short() -> None:
    assert linear_betas(21)[-1] < 1.0
    with pytest.raises(InputError, match=r"train_steps=20 .* use 21"):
        linear_betas(20)
    with pytest.raises(InputError, match="train_steps=0"):
        NoiseSchedule.linear(0)


def test_schedule_by_hand() -> None:
    # Training betas 0.1, 0.2, 0.5: alpha_bar = 0.9, 0.72, 0.36. Executed: t = 2, then t = 0.
    schedule = NoiseSchedule((0.1, 0.2, 0.5), (2, 1, 0)).respace([2, 0])
    assert (schedule.train_steps, schedule.steps, schedule.timesteps) == (3, 2, (2, 0))
    expected = {
        "train_alpha_bar": [0.9, 0.72, 0.36],
        "alpha_bar": [0.36, 0.9],
        "alpha_bar_prev": [0.9, 1.0],
        "beta": [0.6, 0.1],  # 1 - 0.36/0.9, 1 - 0.9/1
        "log_beta": [math.log(0.6), math.log(0.1)],
        "posterior_variance": [0.6 * 0.1 / 0.64, 0.0],
        "posterior_log_variance": [math.log(0.09375), math.log(0.09375)],  # the last takes the one before
        "posterior_mean_x0": [0.6 * math.sqrt(0.9) / 0.64, 1.0],
        "posterior_mean_xt": [0.1 * math.sqrt(0.4) / 0.64, 0.0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(schedule, name), values, rtol=1e-14, atol=1e-16, err_msg=name)


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_arrays_are_complete_finite_and_read_only(steps: int) -> None:
    schedule = NoiseSchedule.linear().respace(respaced_timesteps(1000, steps))
    names = (
        "alpha_bar alpha_bar_prev beta log_beta posterior_variance posterior_log_variance "
        "posterior_mean_x0 posterior_mean_xt"
    )
    for name in names.split():
        array = getattr(schedule, name)
        assert array.shape == (steps,), name
        assert array.dtype == np.float64, name
        assert np.isfinite(array).all(), name
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0
    assert schedule.alpha_bar_prev[-1] == 1.0
    assert schedule.posterior_variance[-1] == 0.0


def test_respaced_betas_multiply_up_to_the_training_schedule() -> None:
    full = NoiseSchedule.linear()
    np.testing.assert_allclose(full.beta[::-1], linear_betas(), rtol=1e-11)  # not respaced: the betas themselves
    short = full.respace(respaced_timesteps(1000, 33))
    np.testing.assert_allclose(
        np.cumprod(1.0 - short.beta[::-1]), full.train_alpha_bar[list(short.timesteps[::-1])], rtol=1e-12
    )


def test_posterior_mean_reproduces_a_noiseless_path() -> None:
    # If x_t = sqrt(ab) x_0 exactly, the posterior mean is sqrt(ab_prev) x_0 (Ho et al., equation 7).
    schedule = NoiseSchedule.linear().respace(respaced_timesteps(1000, 20))
    mean = schedule.posterior_mean_x0 + schedule.posterior_mean_xt * np.sqrt(schedule.alpha_bar)
    np.testing.assert_allclose(mean, np.sqrt(schedule.alpha_bar_prev), rtol=1e-12)


def test_equality_and_hash() -> None:
    one = NoiseSchedule.linear(100).respace((99, 50, 0))
    two = NoiseSchedule.linear(100).respace(np.array([99, 50, 0]))
    assert one.alpha_bar is one.alpha_bar  # computed once; must not disturb equality
    assert one == two
    assert hash(one) == hash(two)
    assert one != NoiseSchedule.linear(100).respace((99, 51, 0))
    assert one != NoiseSchedule.linear(101).respace((99, 50, 0))
    assert one.respace((7, 3)) == NoiseSchedule.linear(100).respace((7, 3))  # always the training timesteps


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ((), "empty"),
        ((100, 0), r"timestep 100 is outside \[0, 99\]"),
        ((5, -1), "timestep -1 is outside"),
        ((0, 5), "strictly decrease"),
        ((5, 5), "timesteps run 5, 5"),
        ((5.5, 0), "timestep 5.5 is not a whole number"),
    ],
)
def test_bad_timesteps(timesteps, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NoiseSchedule.linear(100).respace(timesteps)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_bad_betas(beta: float) -> None:
    with pytest.raises(InputError, match=r"betas\[1\]="):
        NoiseSchedule((0.1, beta), (1, 0))
