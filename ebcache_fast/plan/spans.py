"""Rules over spans: what a step may do over several sites at once."""

from dataclasses import dataclass
from typing import Protocol

from ebcache_fast.errors import TableError
from ebcache_fast.plan.emitter import Emitter
from ebcache_fast.plan.program import CHANGE, MARK, Slot
from ebcache_fast.plan.rules import check_forecast


class SpanRule(Protocol):
    """Rule of the sites from ``first`` to ``last``, hashable and without state."""

    @property
    def first(self) -> int:
        """The first of its sites, counted through the model."""
        ...

    @property
    def last(self) -> int:
        """The last of its sites."""
        ...

    @property
    def skips(self) -> bool:
        """True if nothing is done at its sites."""
        ...

    def check(self) -> None:
        """Raise TableError for arguments out of range, but for its sites."""
        ...

    def enter(self, emitter: Emitter) -> None:
        """Say what is done before its first site."""
        ...

    def leave(self, emitter: Emitter) -> None:
        """Say what is done after its last site."""
        ...


@dataclass(frozen=True)
class KeepSpan:
    """Keep what the sites add to the stream, gates included; ``age`` says as which of several, ``ages`` as how many.

    Source: Delta-DiT, Chen et al., arXiv 2406.01125.
    """

    first: int
    last: int
    age: int = 0
    ages: int = 1
    skips = False

    def check(self) -> None:
        """Raise TableError for an age below 0, or fewer than one."""
        for name, value, least in (("age", self.age, 0), ("ages", self.ages, 1)):
            if type(value) is not int or value < least:
                raise TableError(f"span {self.first} to {self.last}: {name}: expected {least} or more, got {value!r}")

    def enter(self, emitter: Emitter) -> None:
        emitter.copy(Slot(MARK, self.first, self.last))

    def leave(self, emitter: Emitter) -> None:
        kept = Slot(CHANGE, self.first, self.last, self.age)
        emitter.subtract(None, Slot(MARK, self.first, self.last), kept)
        for age in range(self.age + 1, self.age + self.ages):
            emitter.copy(kept._replace(age=age), kept)


@dataclass(frozen=True)
class SkipSpan:
    """Add what was kept of the sites, and run none of them. Source: Delta-DiT, as `KeepSpan`."""

    first: int
    last: int
    skips = True

    def check(self) -> None:
        """Accept it: it has no arguments besides its sites."""

    def enter(self, emitter: Emitter) -> None:
        emitter.add(Slot(CHANGE, self.first, self.last), None)

    def leave(self, emitter: Emitter) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class ForecastSpan:
    """Add what the last ``order`` + 1 changes by the sites forecast by a law, and run none of them.

    They are kept by `KeepSpan` of ages 0 to ``order``, in turn. Over all sites it reads ``order`` + 1 tensors, where
    reuse reads one a site. law: one of `factors.LAWS`.
    Source: TaylorSeer, Liu et al., arXiv 2503.06923, of one value for all layers.
    """

    first: int
    last: int
    order: int
    law: str = "taylor"
    skips = True

    def check(self) -> None:
        """Raise TableError for an order or a law that there is not."""
        check_forecast(f"span {self.first} to {self.last}", self.order, self.law)

    def enter(self, emitter: Emitter) -> None:
        for age in range(self.order + 1):
            emitter.add(Slot(CHANGE, self.first, self.last, age), None, law=self.law)

    def leave(self, emitter: Emitter) -> None:
        """Do nothing."""
