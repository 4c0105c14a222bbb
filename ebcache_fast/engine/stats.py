"""What an engine did, counted."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Stats:
    """A snapshot of what ran since the engine was made; see `ebcache_fast.stats`."""

    steps: Mapping[str, int]  # by the name of their step type; "MIXED" are those whose layers differ
    replays: int  # launches of a CUDA graph
    eager: Mapping[str, int]  # steps that ran operation by operation, by reason
    hits: int  # branches that were read from the cache
    trajectories: int
    graphs: int  # captured, and held now
    cache_bytes: int  # of the feature caches held now
    operations: Mapping[str, str]  # what runs each fused operation
    # Of a drop-in alone, by reason:
    refreshed: Mapping[str, int] = field(default_factory=dict)  # steps that computed all though their plan reuses
    originals: Mapping[str, int] = field(default_factory=dict)  # calls that the model's own forward answered
    hidden_by: str | None = None  # what was put in the place of the drop-in since, so that calls do not come to it


@dataclass
class Counts:
    """Where the engine and its buffer sets count."""

    steps: Counter[str] = field(default_factory=Counter)
    replays: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    hits: int = 0
    trajectories: int = 0
    told: set[str] = field(default_factory=set)  # reasons to run eagerly that were logged

    def snapshot(self, graphs: int, cache_bytes: int, operations: Mapping[str, str]) -> Stats:
        """What was counted so far."""
        return Stats(
            steps=MappingProxyType(dict(self.steps)),
            replays=self.replays,
            eager=MappingProxyType(dict(self.eager)),
            hits=self.hits,
            trajectories=self.trajectories,
            graphs=graphs,
            cache_bytes=cache_bytes,
            operations=MappingProxyType(dict(operations)),
        )
