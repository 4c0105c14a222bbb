"""TaylorSeer and HiCache: a full step at a fixed interval, every branch forecast in between.

Sources: TaylorSeer, Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers"
(arXiv 2503.06923); HiCache, Feng et al. (arXiv 2508.16984), the same with Hermite polynomials. Both divide a difference
by the interval; ours divide by the distance of the steps that were computed, which is the same where that is even.
Their code computes the first steps too, before the interval begins (``first_enhance``); ours begins with one.
"""

import math

from ebcache_fast.errors import TableError
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.policies.forecast import Of, forecast

USUAL_ORDER = 1


def taylorseer(
    timesteps: tuple[float, ...],
    interval: float,
    shape: ModelShape,
    order: int = USUAL_ORDER,
    law: str = "taylor",
    of: Of = "branches",
) -> Plan:
    """Plan full steps at every ``interval``-th executed step from the first on, and forecasts between them.

    A fraction spreads them as evenly as integers allow. order, law, of: as of `forecast`; the paper recommends order 4
    on DiT, where few steps of a sampler without noise gain by more than 2.
    Raises TableError for an interval below 1, and as `forecast` does.
    """
    if not 1 <= interval < math.inf:
        raise TableError(f"interval: expected 1 or more, got {interval}; 1 caches nothing")
    count = math.ceil(len(timesteps) / interval)
    computed = {math.floor(i * interval) for i in range(count)}
    return forecast(timesteps, shape, (step for step in computed if step < len(timesteps)), order, law, of)


def taylorseer_of(timesteps: tuple[float, ...], shape: ModelShape, n_order: str) -> Plan:
    """Make `taylorseer`'s plan of an interval, or "INTERVAL:ORDER"; ValueError for what are no numbers."""
    return _of(timesteps, shape, n_order, "taylor")


def hicache_of(timesteps: tuple[float, ...], shape: ModelShape, n_order: str) -> Plan:
    """Make the plan of HiCache, of an interval, or "INTERVAL:ORDER"; ValueError for what are no numbers."""
    return _of(timesteps, shape, n_order, "hermite")


def _of(timesteps: tuple[float, ...], shape: ModelShape, text: str, law: str) -> Plan:
    interval, _, order = text.partition(":")
    return taylorseer(timesteps, float(interval), shape, int(order) if order else USUAL_ORDER, law)
