"""Rules over spans: what a step may do over several sites at once."""

from dataclasses import dataclass
from typing import Protocol

from ebcache_fast.plan.emitter import Emitter
from ebcache_fast.plan.program import CHANGE, MARK, Slot


class SpanRule(Protocol):
    """Rule of the sites from ``first`` to ``last``, hashable and without state."""

    first: int
    last: int

    @property
    def skips(self) -> bool:
        """True if nothing is done at its sites."""
        ...

    def enter(self, emitter: Emitter) -> None:
        """Say what is done before its first site."""
        ...

    def leave(self, emitter: Emitter) -> None:
        """Say what is done after its last site."""
        ...


@dataclass(frozen=True)
class KeepSpan:
    """Keep what the sites add to the stream, gates included. Source: Delta-DiT, Chen et al., arXiv 2406.01125."""

    first: int
    last: int
    skips = False

    def enter(self, emitter: Emitter) -> None:
        emitter.copy(Slot(MARK, self.first, self.last))

    def leave(self, emitter: Emitter) -> None:
        emitter.subtract(None, Slot(MARK, self.first, self.last), Slot(CHANGE, self.first, self.last))


@dataclass(frozen=True)
class SkipSpan:
    """Add what was kept of the sites, and run none of them. Source: Delta-DiT, as `KeepSpan`."""

    first: int
    last: int
    skips = True

    def enter(self, emitter: Emitter) -> None:
        emitter.add(Slot(CHANGE, self.first, self.last), None)

    def leave(self, emitter: Emitter) -> None:
        """Do nothing."""
