"""Layers in the middle of a model are left out in every second step: an example of a rule and a policy of one's own."""

from dataclasses import dataclass

from ebcache_fast.plan import COMPUTE, ModelShape, Plan, StepPlan
from ebcache_fast.plan.emitter import Emitter
from ebcache_fast.plan.registry import register_rule
from ebcache_fast.plan.sites import Site
from ebcache_fast.policies.registry import register_policy


@register_rule("skip")
@dataclass(frozen=True)
class Skip:
    """Neither run the branch nor add what was kept."""

    runs_branch = False

    def check(self, site: Site) -> None:
        """Any site can do without."""

    def emit(self, site: int, emitter: Emitter) -> None:
        """Nothing."""


@register_policy("skip-layers")
def skip_layers(timesteps: tuple[float, ...], shape: ModelShape, argument: str = "2") -> Plan:
    """Every second step without the ``argument`` layers in the middle."""
    count = int(argument)
    first = (shape.depth - count) // 2
    skipped = tuple(Skip() if first <= site.layer < first + count else COMPUTE for site in shape.sites)
    full = (COMPUTE,) * len(shape.sites)
    steps = tuple(StepPlan(shape.sites, skipped if i % 2 else full) for i in range(len(timesteps)))
    return Plan(steps, timesteps)
