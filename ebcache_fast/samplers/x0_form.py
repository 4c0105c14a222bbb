"""Steps as papers write them, in x and the data x0 that a model predicts, made into coefficients of its output."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from ebcache_fast.errors import InputError
from ebcache_fast.samplers.coefficients import Sampler, StepRow

Array = NDArray[np.float64]


class Prediction(Enum):
    """Meaning of a model's output: noise eps, or velocity v; values are diffusers' names."""

    EPS = "epsilon"  # the noise in x = alpha * x0 + sigma * eps
    V = "v_prediction"  # alpha * eps - sigma * x0; Salimans and Ho 2022 (arXiv 2202.00512), appendix D


@dataclass(frozen=True)
class X0Form:
    """``x' = on_x * x + on_x0 * x0 + on_previous * (x0 of the step before) + noise``, arrays of (S,) or one number.

    The noise is as in `StepRow`.
    """

    on_x: Array
    on_x0: Array
    on_previous: Array | float = 0.0
    min_log: Array | float = 0.0
    max_log: Array | float = 0.0
    noise_on: Array | float = 0.0
    sigma: Array | float = 0.0

    def sampler(
        self, name: str, timesteps: tuple[int, ...], alpha_bar: Array, prediction: Prediction = Prediction.EPS
    ) -> Sampler:
        """The sampler for a model with such an output; alpha_bar (S,) is that of x at each step.

        Raises InputError where an x without any data in it, alpha_bar 0, meets a model that predicts eps.
        """
        x0_of_x, x0_of_out = _data(name, alpha_bar, prediction)
        remembers = np.any(self.on_previous != 0.0)
        columns = np.broadcast_arrays(
            self.on_x + self.on_x0 * x0_of_x,
            self.on_x0 * x0_of_out,
            self.min_log,
            self.max_log,
            self.noise_on,
            self.sigma,
            self.on_previous,
            x0_of_x * remembers,
            x0_of_out * remembers,
        )
        rows = tuple(StepRow(*row) for row in np.stack(columns, axis=1).tolist())
        return Sampler(name, timesteps, rows, tuple(alpha_bar.tolist()) if prediction is Prediction.V else None)


def _data(name: str, alpha_bar: Array, prediction: Prediction) -> tuple[Array, Array]:
    """The factors of x and of the output in x0, (S,) each."""
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    if prediction is Prediction.V:
        return alpha, -sigma
    if not alpha.all():
        raise InputError(
            f"sampler {name} begins at alpha_bar=0, where eps says nothing of the data; it must be above 0, or the "
            "model one that predicts v"
        )
    return 1.0 / alpha, -sigma / alpha
