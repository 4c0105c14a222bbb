"""What a sampler is: timesteps, and for each one row of the coefficients of `reference.sampler_update`."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebcache_fast.errors import InputError


class StepRow(NamedTuple):
    """Coefficients of one executed step, in the order of the columns of `Sampler.rows`.

    cx, ce: factors of the latent and of eps. min_log, max_log: bounds between which the model's variance
    output interpolates the log variance. noise_on: 1 where noise of that variance is added, else 0. sigma:
    a fixed standard deviation, for samplers that know theirs beforehand.
    """

    cx: float
    ce: float
    min_log: float
    max_log: float
    noise_on: float
    sigma: float


@dataclass(frozen=True)
class Sampler:
    """A sampler by name, with its timesteps and one StepRow per step, both in execution order. Hashable.

    Raises InputError when the two differ in length or are empty.
    """

    name: str
    timesteps: tuple[int, ...]
    step_rows: tuple[StepRow, ...]

    def __post_init__(self) -> None:
        if not self.timesteps or len(self.timesteps) != len(self.step_rows):
            raise InputError(
                f"sampler {self.name} has {len(self.timesteps)} timesteps and {len(self.step_rows)} rows; "
                "give at least one timestep, and one row of coefficients for each"
            )

    @property
    def steps(self) -> int:
        """Number S of executed steps."""
        return len(self.timesteps)

    @cached_property
    def rows(self) -> NDArray[np.float64]:
        """The coefficients, (S, 6) float64, read-only, columns as in StepRow."""
        rows = np.array(self.step_rows, dtype=np.float64)
        rows.setflags(write=False)
        return rows

    @property
    def draws_noise(self) -> bool:
        """Whether any step adds noise."""
        return any(row.noise_on != 0.0 or row.sigma != 0.0 for row in self.step_rows)
