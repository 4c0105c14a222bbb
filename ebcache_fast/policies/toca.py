"""ToCa: between full steps all attention is reused, and each MLP computed for some tokens alone.

Source: Zou et al., "Accelerating Diffusion Transformers with Token-wise Feature Caching" (arXiv 2410.05317). Paper and
code: how many tokens is that of the released code for DiT, whose factors the paper leaves open (layers -0.2 to +0.2,
steps +2 to -2, and 2.5 for the MLP, which takes over attention's share). Which tokens differs from both: theirs are
those of the largest column sums of a kept attention map, raised by their age and on a grid, which no fused attention
gives; ours those whose kept output is largest (see `Tokens`).
"""

from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, REUSE, Branch, ModelShape, Plan, Rule, StepPlan, StepType, Tokens

OF_LAYERS, OF_STEPS, OF_MLP = -0.2, 2.0, 2.5
SENSITIVE = 0.2, 0.4  # of the run, counted from its end: every second step is full there


def toca(timesteps: tuple[float, ...], shape: ModelShape, interval: int = 4, ratio: float = 0.1) -> Plan:
    """Plan full steps about every ``interval`` steps, and about ``ratio`` of all tokens in the MLPs between them.

    Numbers of tokens differ from layer to layer and step to step, so that every cached step is a program of its own.
    Raises TableError for an interval below 1, a ratio outside [0, 1], and for a model without MLPs.
    """
    if type(interval) is not int or interval < 1:
        raise TableError(f"interval: expected a whole number from 1 on, got {interval!r}; 1 caches nothing")
    if not 0 <= ratio <= 1:
        raise TableError(f"ratio: expected 0 to 1, a share of all tokens, got {ratio}; 0 reuses all")
    if Branch.MLP not in shape.branches:
        raise TableError("toca: expected a model with MLPs, which compute the chosen tokens; use fora here")
    steps, full = len(timesteps), StepPlan.uniform(StepType.NO_CACHE, shape.sites)
    plans: list[StepPlan] = []
    waiting = 0  # cached steps until the next full one
    for index in reversed(range(steps)):
        if waiting == 0:
            plans.append(full)
            waiting = _threshold(index / steps, interval) - 1
        else:
            plans.append(StepPlan(shape.sites, _rules(shape, index / steps, ratio)))
            waiting -= 1
    return Plan(tuple(plans), timesteps)


def toca_of(timesteps: tuple[float, ...], shape: ModelShape, n_ratio: str) -> Plan:
    """Make `toca`'s plan of "INTERVAL" or "INTERVAL:RATIO"; ValueError for what are no numbers."""
    interval, _, ratio = n_ratio.partition(":")
    return toca(timesteps, shape, int(interval), *([float(ratio)] if ratio else []))


def _threshold(noise: float, interval: int) -> int:
    """Steps from a full one to the next, by how far the step is from the run's end."""
    low, high = SENSITIVE
    return min(2, interval) if low <= noise < high else max(1, round(interval / (1.4 - 0.8 * noise)))


def _rules(shape: ModelShape, noise: float, ratio: float) -> tuple[Rule, ...]:
    depth = 1 + shape.sites[-1].layer
    found: list[Rule] = []
    for site in shape.sites:
        of_layer = 1 + OF_LAYERS - 2 * OF_LAYERS * site.layer / max(1, depth - 1)
        of_step = 1 + OF_STEPS - 2 * OF_STEPS * noise
        share = min(1.0, max(0.0, ratio * of_layer * of_step * OF_MLP))
        count = int(share * shape.tokens) if site.branch is Branch.MLP else 0
        found.append(COMPUTE if count == shape.tokens else Tokens(count) if count else REUSE)
    return tuple(found)
