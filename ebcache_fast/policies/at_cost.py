"""Policies at a cost: of each, the plan that comes nearest to so many multiply-accumulates."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from ebcache_fast.errors import TableError
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.policies.fora import fora
from ebcache_fast.policies.power import power
from ebcache_fast.policies.taylorseer import taylorseer

Timesteps = tuple[float, ...]
FAR = 0.1  # of the cost asked for: what is further away is another cost


def _fora(timesteps: Timesteps, shape: ModelShape) -> Iterator[Plan]:
    last = max(1, len(timesteps) - 1)
    return (fora(timesteps, last / full, shape) for full in range(1, last + 1))


def _taylorseer(timesteps: Timesteps, shape: ModelShape) -> Iterator[Plan]:
    steps = len(timesteps)
    return (taylorseer(timesteps, steps / full, shape) for full in range(1, steps + 1))


def _hicache(timesteps: Timesteps, shape: ModelShape) -> Iterator[Plan]:
    steps = len(timesteps)
    return (taylorseer(timesteps, steps / full, shape, order=2, law="hermite") for full in range(1, steps + 1))


def _power(timesteps: Timesteps, shape: ModelShape) -> Iterator[Plan]:
    return (power(timesteps, shape, computed) for computed in range(1, len(timesteps) + 1))


# Every plan that a policy has for a run, by the policy's name.
FAMILIES: Final[Mapping[str, Callable[[Timesteps, ModelShape], Iterator[Plan]]]] = MappingProxyType(
    {"fora": _fora, "taylorseer": _taylorseer, "hicache": _hicache, "power": _power}
)


def at_cost(name: str, timesteps: Timesteps, macs: float, shape: ModelShape) -> Plan:
    """The plan of a policy whose MACs a row are nearest to ``macs``, of two the cheaper.

    Raises TableError for a policy without a family of plans, and where none comes within a tenth: it names the costs
    that can be had.
    """
    if name not in FAMILIES:
        raise TableError(f"policy {name!r}: expected one of {', '.join(FAMILIES)}, which have a plan for many costs")
    costs = {plan.macs(shape): plan for plan in FAMILIES[name](timesteps, shape)}
    nearest = min(sorted(costs), key=lambda cost: abs(cost - macs))
    if abs(nearest - macs) > FAR * macs:
        uncached = Plan.uncached(timesteps, shape.sites).macs(shape)
        low, high = uncached / max(costs), uncached / min(costs)
        raise TableError(
            f"policy {name!r}: no plan of {len(timesteps)} steps is near a speed-up of {uncached / macs:.2f} by MACs; "
            f"it has {len(costs)} from {low:.2f} to {high:.2f}, and {uncached / nearest:.2f} is the nearest"
        )
    return costs[nearest]
