"""Noise schedules and their respacing to fewer steps. numpy only, float64 throughout.

Two index conventions meet here. *Training* arrays are indexed by the timestep ``t`` (0 is the least noise).
Everything about sampling is in *execution order*: entry 0 is the step that runs first, with the most noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from operator import index
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ebcache_fast.errors import InputError

Array = NDArray[np.float64]

# Ho et al. 2020, section 4: variances from 1e-4 to 2e-2 over 1000 steps; other lengths are scaled to match.
TRAIN_STEPS = 1000  # of every model whose table or caller does not say otherwise
_BETA_FIRST, _BETA_LAST, _BETA_STEPS = 1e-4, 2e-2, 1000
_MIN_LINEAR_STEPS = 21  # with 20 or fewer the scaled last beta would reach 1


def linear_betas(train_steps: int = 1000) -> Array:
    """The linear schedule beta_t by timestep, (train_steps,), from 1e-4 to 2e-2 times 1000/train_steps.

    Source: Ho et al. 2020 (arXiv 2006.11239), section 4; the scaling is that of IDDPM, ADM and DiT.
    Raises InputError when train_steps is under 21, where the last beta would reach 1.
    """
    if train_steps < _MIN_LINEAR_STEPS:
        raise InputError(
            f"train_steps={train_steps} is too short for the linear schedule; use {_MIN_LINEAR_STEPS} or more"
        )
    scale = _BETA_STEPS / train_steps
    return np.linspace(scale * _BETA_FIRST, scale * _BETA_LAST, train_steps, dtype=np.float64)


def respaced_timesteps(train_steps: int, steps: int) -> tuple[int, ...]:
    """`steps` timesteps spread evenly over [0, train_steps - 1], both ends kept, in execution order.

    The stride is a fraction that is summed up and rounded, ties to even, as in IDDPM (Nichol and Dhariwal
    2021, arXiv 2102.09672, section 4). It is summed, not multiplied, because near ties the two round
    differently and tables are keyed by these integers. A single step is timestep 0, as in IDDPM.
    Raises InputError when steps is outside [1, train_steps].
    """
    _check_steps(train_steps, steps)
    stride = (train_steps - 1) / (steps - 1) if steps > 1 else 1.0
    position = 0.0
    ascending = []
    for _ in range(steps):
        ascending.append(round(position))
        position += stride
    return tuple(reversed(ascending))


def solver_timesteps(train_steps: int, steps: int) -> tuple[int, ...]:
    """`steps` timesteps spread evenly over [0, train_steps - 1], in execution order, without the last one, 0.

    Rounded, ties to even; as PixArt-Sigma spaces its solver, which goes on from the last of them to no noise at all.
    Raises InputError when steps is outside [1, train_steps - 1].
    """
    _check_steps(train_steps - 1, steps)
    return tuple(np.linspace(0, train_steps - 1, steps + 1).round()[:0:-1].astype(np.int64).tolist())


def ddim_timesteps(train_steps: int, steps: int) -> tuple[int, ...]:
    """The timesteps 0, k, 2k, ... in execution order, k the smallest integer stride giving exactly `steps`.

    Source: Song et al. 2020 (arXiv 2010.02502), appendix D.2, linear; ADM and DiT call it "ddimN".
    Raises InputError when steps is outside [1, train_steps], or when no stride gives it: the message
    then names the nearest counts that a stride does give.
    """
    _check_steps(train_steps, steps)
    smallest = -(-train_steps // steps)  # ceil: smaller strides give more than `steps`
    if len(range(0, train_steps, smallest)) == steps:
        return tuple(reversed(range(0, train_steps, smallest)))
    fewer = len(range(0, train_steps, smallest))
    more = len(range(0, train_steps, smallest - 1))
    raise InputError(
        f"steps={steps}: no integer stride over {train_steps} timesteps gives it; use {fewer} or {more}, "
        "or the fractional spacing of respaced_timesteps"
    )


@dataclass(frozen=True)
class NoiseSchedule:
    """A training schedule and the timesteps of it that a sampler executes.

    betas: the training variances by timestep, each in (0, 1). timesteps: execution order, strictly
    decreasing, each in [0, len(betas) - 1]. Schedules are equal, and hash alike, when these two fields are.
    Every array is float64 and read-only. All but `train_alpha_bar` have one entry per executed step, in
    execution order; on a schedule that was not respaced, `array[::-1]` is therefore indexed by timestep.
    Names follow Ho et al. 2020 (arXiv 2006.11239), section 2; respaced betas follow IDDPM, equation 19.
    Raises InputError when a field breaks the limits above.
    """

    betas: tuple[float, ...] = field(repr=False)
    timesteps: tuple[int, ...]

    def __post_init__(self) -> None:
        for t, beta in enumerate(self.betas):
            if not 0.0 < beta < 1.0:
                raise InputError(f"betas[{t}]={beta} is outside (0, 1); give variances inside it")
        _check_timesteps(len(self.betas), self.timesteps)

    @classmethod
    def linear(cls, train_steps: int = 1000) -> Self:
        """The full linear schedule, every timestep executed. Raises InputError as `linear_betas` does."""
        return cls(tuple(linear_betas(train_steps).tolist()), tuple(reversed(range(train_steps))))

    def respace(self, timesteps: Sequence[float]) -> Self:
        """Return this training schedule with other executed timesteps, counted on the training schedule.

        Raises InputError when they are empty, no whole numbers, out of range or not strictly decreasing.
        """
        return type(self)(self.betas, tuple(_whole(t) for t in timesteps))

    @property
    def train_steps(self) -> int:
        """Number of timesteps of the training schedule."""
        return len(self.betas)

    @property
    def steps(self) -> int:
        """Number S of executed steps."""
        return len(self.timesteps)

    @cached_property
    def train_alpha_bar(self) -> Array:
        """Product of (1 - beta) up to and including t, indexed by timestep t, (train_steps,)."""
        return _frozen(np.cumprod(1.0 - np.asarray(self.betas), dtype=np.float64))

    @cached_property
    def alpha_bar(self) -> Array:
        """alpha_bar at each executed step, (S,)."""
        return _frozen(self.train_alpha_bar[list(self.timesteps)])

    @cached_property
    def alpha_bar_prev(self) -> Array:
        """alpha_bar that each step leads to: that of the next executed step, 1 after the last, (S,)."""
        return _frozen(np.append(self.alpha_bar[1:], 1.0))

    @cached_property
    def beta(self) -> Array:
        """Variance of one executed step, 1 - alpha_bar / alpha_bar_prev, (S,)."""
        return _frozen(1.0 - self.alpha_bar / self.alpha_bar_prev)

    @cached_property
    def log_beta(self) -> Array:
        """Upper bound of the learned log variance (IDDPM, equation 15), (S,)."""
        return _frozen(np.log(self.beta))

    @cached_property
    def posterior_variance(self) -> Array:
        """Variance of q(x_prev | x_t, x_0) (Ho et al., equation 7); 0 at the last step, (S,)."""
        return _frozen(self.beta * (1.0 - self.alpha_bar_prev) / (1.0 - self.alpha_bar))

    @cached_property
    def posterior_log_variance(self) -> Array:
        """Lower bound of the learned log variance (IDDPM, equation 15), finite everywhere, (S,).

        The last step, whose posterior variance is 0, takes the entry of the step before it. A schedule of a
        single step has none before it and takes log beta.
        """
        if self.steps == 1:
            return self.log_beta
        logs = np.log(self.posterior_variance[:-1])
        return _frozen(np.append(logs, logs[-1]))

    @cached_property
    def posterior_mean_x0(self) -> Array:
        """Coefficient of x_0 in the mean of q(x_prev | x_t, x_0) (Ho et al., equation 7), (S,)."""
        return _frozen(self.beta * np.sqrt(self.alpha_bar_prev) / (1.0 - self.alpha_bar))

    @cached_property
    def posterior_mean_xt(self) -> Array:
        """Coefficient of x_t in the mean of q(x_prev | x_t, x_0) (Ho et al., equation 7), (S,)."""
        return _frozen((1.0 - self.alpha_bar_prev) * np.sqrt(1.0 - self.beta) / (1.0 - self.alpha_bar))


def _frozen(values: Array) -> Array:
    values.setflags(write=False)
    return values


def _whole(t: float) -> int:
    try:
        return index(t)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(
            f"timestep {t!r} is not a whole number; give integers in execution order: a table with others, such as "
            "Euler's, is for ebcache_fast.enable, in the loop that has them"
        ) from None


def _check_steps(train_steps: int, steps: int) -> None:
    if train_steps < 1:
        raise InputError(f"train_steps={train_steps} is not positive; give the training length")
    if not 1 <= steps <= train_steps:
        raise InputError(
            f"steps={steps} is outside [1, {train_steps}]; choose at most the number of training timesteps"
        )


def _check_timesteps(train_steps: int, timesteps: tuple[int, ...]) -> None:
    if not timesteps:
        raise InputError("timesteps is empty; give at least one, in execution order")
    for t in timesteps:
        if not 0 <= t < train_steps:
            raise InputError(f"timestep {t} is outside [0, {train_steps - 1}]; keep to the trained timesteps")
    for first, second in pairwise(timesteps):
        if second >= first:
            raise InputError(f"timesteps run {first}, {second}; they must strictly decrease, as execution order does")
