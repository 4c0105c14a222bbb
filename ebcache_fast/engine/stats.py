"""What an engine did, counted."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ebcache_fast.plan import StepPlan


@dataclass(frozen=True)
class Stats:
    """A snapshot of what ran since the engine was made; see `ebcache_fast.stats`."""

    steps: Mapping[str, int]  # by the name of their step type; "MIXED" are those whose layers differ
    replays: int  # launches of a CUDA graph
    eager: Mapping[str, int]  # steps that ran operation by operation, by reason
    refreshed: Mapping[str, int]  # steps that computed everything where the plan could not be followed, by reason
    originals: Mapping[str, int]  # calls that the model's own forward answered, by reason
    hits: int  # branches that were read from the cache
    trajectories: int
    graphs: int  # captured, and held now
    cache_bytes: int  # of the feature caches held now
    operations: Mapping[str, str]  # what runs each fused operation


@dataclass
class Counts:
    """Where the engine and its buffer sets count."""

    steps: Counter[str] = field(default_factory=Counter)
    replays: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    refreshed: Counter[str] = field(default_factory=Counter)
    originals: Counter[str] = field(default_factory=Counter)
    hits: int = 0
    trajectories: int = 0
    told: set[str] = field(default_factory=set)  # reasons to run eagerly that were logged

    def snapshot(self, graphs: int, cache_bytes: int, operations: Mapping[str, str]) -> Stats:
        """What was counted so far."""
        read_only = (MappingProxyType(dict(c)) for c in (self.steps, self.eager, self.refreshed, self.originals))
        steps, eager, refreshed, originals = read_only
        return Stats(
            steps, self.replays, eager, refreshed, originals, self.hits, self.trajectories, graphs, cache_bytes,
            MappingProxyType(dict(operations)),
        )  # fmt: skip


def type_name(plan: StepPlan) -> str:
    """How a step is counted."""
    return "MIXED" if plan.step_type is None else plan.step_type.name
