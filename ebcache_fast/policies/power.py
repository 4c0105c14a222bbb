"""A schedule without calibration: computed steps that lie denser at high noise, and forecasts between them.

The exponent was found on this package's bundled model; no paper has it.
"""

from ebcache_fast.errors import TableError
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.policies.forecast import Of, forecast

EXPONENT = 2 / 3


def power(timesteps: tuple[float, ...], shape: ModelShape, computed: int, order: int = 1, of: Of = "stack") -> Plan:
    """Plan so many computed steps, the n-th at ``(S - 1) * (n / computed) ** (2 / 3)`` of S, rounded.

    Where that is the step before, or leaves too few for the others, it is the nearest that is neither. order, of: as of
    `forecast`. Raises TableError for a number of computed steps outside [1, S].
    """
    steps = len(timesteps)
    if type(computed) is not int or not 1 <= computed <= steps:
        raise TableError(f"computed: expected 1 to {steps}, the number of steps, got {computed!r}")
    full = [0]
    for n in range(1, computed):
        nearest = round((steps - 1) * (n / computed) ** EXPONENT)
        full.append(min(max(nearest, full[-1] + 1), steps - computed + n))
    return forecast(timesteps, shape, full, order, of=of)


def power_of(timesteps: tuple[float, ...], shape: ModelShape, m: str) -> Plan:
    """Make `power`'s plan of the number that ``m`` spells; ValueError for what is none."""
    return power(timesteps, shape, int(m))
