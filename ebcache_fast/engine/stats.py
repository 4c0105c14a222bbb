"""Counts of what an engine did."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Stats:
    """A snapshot of what ran since the engine was made; see `ebcache_fast.stats`.

    Plain numbers, texts and dicts: `dataclasses.asdict`, json and pickle take it.
    """

    steps: dict[str, int]  # by the name of their step type; see `StepPlan.type_name`
    replays: int  # launches of a CUDA graph
    eager: dict[str, int]  # steps that ran operation by operation, by reason
    hits: int  # branches that were read from the cache
    trajectories: int
    graphs: int  # captured, and held now
    cache_bytes: int  # of the feature caches held now
    operations: dict[str, str]  # what runs each fused operation
    # Of a drop-in alone, by reason:
    refreshed: dict[str, int] = field(default_factory=dict)  # steps that computed all though their plan reuses
    originals: dict[str, int] = field(default_factory=dict)  # calls that the model's own forward answered
    hidden_by: str | None = None  # what was put in the place of the drop-in since, so that calls do not come to it

    def summary(self) -> str:
        """Say it for people, a line for each kind of thing that was done."""
        ran, full = sum(self.steps.values()), self.steps.get("NO_CACHE", 0)
        lines = [
            f"{self.trajectories} runs, {ran} steps: {full} computed everything, {ran - full} reused something "
            f"({self.hits} branches read from the cache)",
            f"{self.graphs} CUDA graphs, {self.replays} launches of one; {self.cache_bytes:,} bytes of caches held",
        ]
        lines += [
            f"computed everything though the table reuses, {_times(n)}: {why}" for why, n in self.refreshed.items()
        ]
        lines += [
            f"answered by the model's own forward, uncached, {_times(n)}: {why}" for why, n in self.originals.items()
        ]
        lines += [f"ran operation by operation, {_times(n)}: {why}" for why, n in self.eager.items()]
        if self.hidden_by is not None:
            lines.append(f"calls do not come here: {self.hidden_by} is in the way")
        return "\n".join(lines)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


class Ran(NamedTuple):
    """Steps that ran at once, as they are counted."""

    names: tuple[str, ...]  # the type of each
    hits: int
    why_eager: str | None  # None of a graph


@dataclass
class Counts:
    """Counters of an engine and its buffer sets."""

    ran: Counter[Ran] = field(default_factory=Counter)
    trajectories: int = 0
    reported: set[str] = field(default_factory=set)  # reasons to run eagerly that were logged

    def snapshot(self, graphs: int, cache_bytes: int, operations: Mapping[str, str]) -> Stats:
        """Stats of what was counted so far."""
        steps, eager = Counter[str](), Counter[str]()
        counted = list(self.ran.items())  # another thread may be counting
        for ran, times in counted:
            for name in ran.names:
                steps[name] += times
            if ran.why_eager is not None:
                eager[ran.why_eager] += times * len(ran.names)
        return Stats(
            steps=dict(steps),
            replays=sum(times for ran, times in counted if ran.why_eager is None),
            eager=dict(eager),
            hits=sum(times * ran.hits for ran, times in counted),
            trajectories=self.trajectories,
            graphs=graphs,
            cache_bytes=cache_bytes,
            operations=dict(operations),
        )
