"""FORA: a full step at a fixed interval, every branch reused in between.

Source: Selvaraju et al., "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration" (arXiv
2407.01425).
"""

import math

from ebcache_fast.errors import TableError
from ebcache_fast.plan import ModelShape, Plan, StepType


def fora(timesteps: tuple[float, ...], interval: float, shape: ModelShape, eps_scale: float = 1.0) -> Plan:
    """Plan full steps where the step index passes a multiple of ``interval``, and at the first executed step.

    The index counts down to 0 at the last executed step, where FORA anchors the phase, so that the last step
    is always full. An interval of 2, 3, 4 is FORA's N; a fraction spreads the full steps as evenly as
    integers allow. Raises TableError for an interval below 1.
    """
    if not 1 <= interval < math.inf:
        raise TableError(f"interval: expected 1 or more, got {interval}; 1 caches nothing")
    last = len(timesteps) - 1
    indices = range(last, -1, -1)
    full = (i == last or math.floor(i / interval) > math.floor((i - 1) / interval) for i in indices)
    types = [StepType.NO_CACHE if f else StepType.ATTN_MLP for f in full]
    return Plan.from_types(types, timesteps, shape.sites, eps_scale)


def fora_of(timesteps: tuple[float, ...], shape: ModelShape, n: str) -> Plan:
    """Make `fora`'s plan of the interval that ``n`` spells; ValueError for what is no number."""
    return fora(timesteps, float(n), shape)


def fora_at_cost(timesteps: tuple[float, ...], macs: int, shape: ModelShape, eps_scale: float = 1.0) -> Plan:
    """The FORA plan to compare at equal cost: as near ``macs`` a row as an interval allows, of two the cheaper."""
    last = max(1, len(timesteps) - 1)
    plans = (fora(timesteps, last / full, shape, eps_scale) for full in range(1, last + 1))
    return min(plans, key=lambda plan: abs(plan.macs(shape) - macs))
