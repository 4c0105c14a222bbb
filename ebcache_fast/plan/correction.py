"""Linear corrections of predicted noise, one a step, which a calibration fits and a sampler's coefficients take."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from ebcache_fast.errors import TableError
from ebcache_fast.plan.timesteps import shown


class Correction(NamedTuple):
    """Factors of a step's noise and of its latent in ``eps' = on_eps * b * eps + on_x * x``, b being the plan's.

    ``on_eps`` alone is an exposure-bias scale of that step's own (Ning et al., arXiv 2308.15321).
    """

    on_eps: float = 1.0
    on_x: float = 0.0


def as_corrections(corrections: Iterable[Iterable[float]], steps: int) -> tuple[Correction, ...]:
    """The corrections of so many steps, or none; TableError, naming the step, for other counts, and for no numbers."""
    try:
        found = tuple(Correction(*map(_as_number, correction)) for correction in corrections)
    except (TypeError, ValueError):
        raise TableError(
            f"corrections: expected a pair of finite numbers, on_eps above 0 and on_x, for each step, got "
            f"{shown(corrections)}"
        ) from None
    if found and len(found) != steps:
        raise TableError(f"corrections: expected {steps}, one per timestep, or none, got {len(found)}")
    for i, correction in enumerate(found):
        if not all(map(math.isfinite, correction)) or correction.on_eps <= 0:
            raise TableError(
                f"corrections[{i}]: expected finite numbers, on_eps above 0, got {tuple(correction)}; (1, 0) is neutral"
            )
    return found


def _as_number(value: float) -> float:
    if isinstance(value, bool | str):
        raise TypeError(value)
    return float(value)
