"""Delta-DiT: some layers at one end are skipped, and what they added at the last full step is added again.

Source: Chen et al., "Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers" (arXiv
2406.01125): rear layers early, when outlines form, front layers late. There is no official code.
"""

from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, KeepSpan, ModelShape, Plan, SkipSpan, StepPlan

BOUNDARY = 0.4  # of the run, counted from its end: rear layers are skipped before, front ones from there on


def delta_dit(
    timesteps: tuple[float, ...], shape: ModelShape, layers: int, interval: int = 2, boundary: float = BOUNDARY
) -> Plan:
    """Plan a full step at every ``interval``-th step and at the boundary, and ``layers`` skipped in all others.

    Raises TableError for layers outside [1, depth], an interval below 1, and a boundary outside [0, 1].
    """
    depth, sites, steps = 1 + shape.sites[-1].layer, len(shape.sites), len(timesteps)
    if type(layers) is not int or not 1 <= layers <= depth:
        raise TableError(f"layers: expected 1 to {depth}, the model's, got {layers!r}")
    if type(interval) is not int or interval < 1:
        raise TableError(f"interval: expected a whole number from 1 on, got {interval!r}; 1 caches nothing")
    if not 0 <= boundary <= 1:
        raise TableError(f"boundary: expected 0 to 1, a share of the run, got {boundary}")
    front = 0, max(i for i, site in enumerate(shape.sites) if site.layer < layers)
    rear = min(i for i, site in enumerate(shape.sites) if site.layer >= depth - layers), sites - 1
    spans = [rear if index > boundary * steps else front for index in reversed(range(steps))]
    plans = []
    for i, span in enumerate(spans):
        is_full = i % interval == 0 or span != spans[i - 1]
        rule = KeepSpan(*span) if is_full else SkipSpan(*span)
        plans.append(StepPlan(shape.sites, (COMPUTE,) * sites, (rule,)))
    return Plan(tuple(plans), timesteps)


def delta_dit_of(timesteps: tuple[float, ...], shape: ModelShape, layers: str) -> Plan:
    """Make `delta_dit`'s plan of "LAYERS" or "LAYERS:INTERVAL"; ValueError for what are no numbers."""
    count, _, interval = layers.partition(":")
    return delta_dit(timesteps, shape, int(count), *([int(interval)] if interval else []))
