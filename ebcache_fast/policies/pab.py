"""PAB: each kind of branch is computed at an interval of its own, within a part of the run.

Source: Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast" (arXiv 2408.12588). Paper and code:
the released CogVideoX configuration reuses attention before its gate, as here; that of Open-Sora, after it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, REUSE, Branch, ModelShape, Plan, StepPlan

Intervals = Mapping[Branch, int]
BETWEEN = 100.0, 850.0  # timesteps of the released CogVideoX configuration, of 1000
# Intervals by name: those of the released configurations, as far as a model has such branches.
PRESETS: Final[Mapping[str, tuple[Intervals, tuple[float, float]]]] = MappingProxyType(
    {
        "cogvideox": ({Branch.SELF_ATTN: 2}, BETWEEN),
        "open-sora": ({Branch.SELF_ATTN: 2, Branch.CROSS_ATTN: 6}, (450.0, 930.0)),
    }
)


def pab(
    timesteps: tuple[float, ...], shape: ModelShape, intervals: Intervals, between: tuple[float, float] = BETWEEN
) -> Plan:
    """Plan each kind of branch to be computed at every so many-th step, and reused else; all others are computed.

    between: timesteps, both ends left out, outside which everything is computed, as at the first step. Raises
    TableError for an interval below 1, and for a branch that the model has not.
    """
    for branch, interval in intervals.items():
        if branch not in shape.branches:
            known = ", ".join(known.name for known in shape.branches)
            raise TableError(f"intervals: expected branches of the model, {known}, got {branch.name}; leave it out")
        if type(interval) is not int or interval < 1:
            raise TableError(f"intervals[{branch.name}]: expected a whole number from 1 on, got {interval!r}")
    low, high = between
    steps = []
    for i, t in enumerate(timesteps):
        is_open = i > 0 and low < t < high
        reused = {branch for branch, interval in intervals.items() if is_open and i % interval}
        rules = tuple(REUSE if site.branch in reused else COMPUTE for site in shape.sites)
        steps.append(StepPlan(shape.sites, rules))
    return Plan(tuple(steps), timesteps)


def pab_of(timesteps: tuple[float, ...], shape: ModelShape, n: str) -> Plan:
    """Make `pab`'s plan of a preset's name, or of one interval for all attention; ValueError for anything else."""
    if n in PRESETS:
        intervals, between = PRESETS[n]
        return pab(timesteps, shape, {b: v for b, v in intervals.items() if b in shape.branches}, between)
    if not n.lstrip("-").isdigit():
        raise ValueError(f"expected an interval, or one of {', '.join(PRESETS)}, got {n!r}")
    attention = [branch for branch in shape.branches if branch is not Branch.MLP]
    return pab(timesteps, shape, dict.fromkeys(attention, int(n)))
