"""Samplers as data: timesteps, and for each one row of the coefficients of `ebcache_fast.ops.update.sampler_update`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ebcache_fast.errors import InputError

LEAST_ALPHA = 0.05  # below it a v is not scaled: eps / alpha would swamp it


class StepRow(NamedTuple):
    """Coefficients of one executed step, in the order of the columns of `Sampler.rows`.

    cx, ce: factors of the latent and of the model's output. min_log, max_log: bounds between which the model's
    variance output interpolates the log variance. noise_on: 1 where noise of that variance is added, else 0.
    sigma: a fixed standard deviation, for samplers that know theirs beforehand. cp: factor of what the step
    before kept; px, pe: factors of the latent and of the output in what this step keeps.
    """

    cx: float
    ce: float
    min_log: float
    max_log: float
    noise_on: float
    sigma: float
    cp: float = 0.0
    px: float = 0.0
    pe: float = 0.0


WITH_MEMORY = len(StepRow._fields)  # columns
WITHOUT_MEMORY = 6  # those before cp


@dataclass(frozen=True)
class Sampler:
    """A sampler by name, with its timesteps and one StepRow per step, both in execution order. Hashable.

    v_alpha_bar: where the model's output is v, alpha_bar of each step; None where it is eps.
    Raises InputError when their lengths differ or are 0, and for a coefficient that is not finite.
    """

    name: str
    timesteps: tuple[int, ...]
    step_rows: tuple[StepRow, ...]
    v_alpha_bar: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.timesteps or len(self.timesteps) != len(self.step_rows):
            raise InputError(
                f"sampler {self.name} has {len(self.timesteps)} timesteps and {len(self.step_rows)} rows; "
                "give at least one timestep, and one row of coefficients for each"
            )
        if self.v_alpha_bar is not None and len(self.v_alpha_bar) != self.steps:
            raise InputError(
                f"sampler {self.name} has {len(self.v_alpha_bar)} alpha_bar for {self.steps} steps; give one for each"
            )
        for t, row in zip(self.timesteps, self.step_rows, strict=True):
            if not all(map(math.isfinite, row)):
                raise InputError(f"sampler {self.name} has {row} at timestep {t}; give finite coefficients")

    @property
    def steps(self) -> int:
        """Number S of executed steps."""
        return len(self.timesteps)

    @cached_property
    def rows(self) -> NDArray[np.float64]:
        """The coefficients, (S, 6) or, with a memory, (S, 9) float64, read-only, columns as in StepRow."""
        rows = np.array(self.step_rows, dtype=np.float64)
        rows = rows if self.has_memory else np.ascontiguousarray(rows[:, :WITHOUT_MEMORY])
        rows.setflags(write=False)
        return rows

    @property
    def draws_noise(self) -> bool:
        """True if any step adds noise."""
        return any(row.noise_on != 0.0 or row.sigma != 0.0 for row in self.step_rows)

    @property
    def has_memory(self) -> bool:
        """True if any step needs what the step before kept."""
        return any(row.cp != 0.0 for row in self.step_rows)

    def scaling_eps(self, b: float, corrections: Sequence[tuple[float, float]] = ()) -> tuple[Self, float]:
        """The sampler for eps scaled by b and then corrected, and the factor that is left for the model's output.

        corrections: the factors of eps and of x at each step, see `ebcache_fast.plan.Correction`; none is neutral. They
        are linear, so that the coefficients take them, and a step does nothing more. An output that is eps takes b
        itself. Of one that is v, eps = alpha * v + sigma * x becomes b times itself with v' = v + (b - 1) * eps /
        alpha: the coefficients take that too, and the factor is 1. Where alpha < 0.05 such a v stays as it is.
        """
        if self.v_alpha_bar is None and not corrections:
            return self, b
        pairs = corrections or [(1.0, 0.0)] * self.steps
        if self.v_alpha_bar is None:
            changes: Iterable[tuple[float, float]] = pairs
        else:
            both = zip(pairs, self.v_alpha_bar, strict=True)
            changes = (scaled_v(b * on_eps, alpha_bar, on_x) for (on_eps, on_x), alpha_bar in both)
        rows = tuple(_with(row, *change) for row, change in zip(self.step_rows, changes, strict=True))
        return replace(self, step_rows=rows), b if self.v_alpha_bar is None else 1.0


def scaled_v(on_eps: float, alpha_bar: float, on_x: float = 0.0) -> tuple[float, float]:
    """The factors of v and of x in a v whose noise is ``on_eps * eps + on_x * x`` in the place of eps.

    They are ``on_eps`` and ``((on_eps - 1) * sigma + on_x) / alpha``; 1 and 0 where alpha < 0.05.
    Source of v: Salimans and Ho, arXiv 2202.00512, appendix D.
    """
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
    return (1.0, 0.0) if alpha < LEAST_ALPHA else (on_eps, ((on_eps - 1.0) * sigma + on_x) / alpha)


def _with(row: StepRow, of_output: float, of_x: float) -> StepRow:
    """The row for ``of_output * output + of_x * x`` in place of the model's output."""
    return row._replace(
        cx=row.cx + row.ce * of_x, ce=row.ce * of_output, px=row.px + row.pe * of_x, pe=row.pe * of_output
    )
