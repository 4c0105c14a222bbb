"""Where the slots of a plan lie, and the gates that its terms are multiplied by."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from ebcache_fast.plan.model_shape import ModelShape
from ebcache_fast.plan.program import Program, Slot, Term
from ebcache_fast.plan.sites import SiteShape


@dataclass(frozen=True)
class Memory:
    """Slots that some step reads, and terms that need a column of the gates' table besides the sites' own.

    A slot of a meaning lies beside those of the sites next to it, so that one launch can add them all. Slots that
    nobody reads share scratch.
    """

    live: tuple[Slot, ...] = ()
    extra: tuple[Term, ...] = ()

    @classmethod
    def of(cls, programs: Iterable[Program]) -> Self:
        """What these programs need, over a whole run."""
        programs = tuple(programs)
        terms = {term for program in programs for launch in program for term in launch.terms}
        return cls(
            live=tuple(sorted({slot for program in programs for slot in program.reads})),
            extra=tuple(sorted(term for term in terms if term.is_weighted or term.gate is None)),
        )

    def scratches_for(self, site_shapes: Iterable[SiteShape]) -> int:
        """How many slots of scratch a model of these sites needs: of sites in parallel, each one of its own."""
        live, longest, group = frozenset(self.live), 0, 0
        for i, shape in enumerate(site_shapes):
            group = (group if shape.is_parallel else 0) + (Slot.of(i) not in live)
            longest = max(longest, group)
        return longest

    def slots_for(self, shape: ModelShape) -> int:
        """How many slots have memory on a model: those that are live, and scratch."""
        return len(self.live) + self.scratches_for(shape.site_shapes)

    def place_of(self, slot: Slot) -> int | None:
        """Where a live slot lies among them; None for one that nobody reads."""
        return self._place.get(slot)

    def column_of(self, term: Term) -> tuple[bool, int]:
        """The gate of a term: whether it is an extra one or a site's own, and its column."""
        own = term.gate is not None and not term.is_weighted
        return (False, term.gate or 0) if own else (True, self._extra[term])

    def are_neighbours(self, one: Term, other: Term) -> bool:
        """Whether the other's slot and gate lie right after the one's."""
        place, next_place = self._place.get(one.slot), self._place.get(other.slot)
        if place is None or next_place != place + 1:
            return False
        (is_extra, column), next_column = self.column_of(one), self.column_of(other)
        return next_column == (is_extra, column + 1)

    @cached_property
    def _place(self) -> dict[Slot, int]:
        return {slot: i for i, slot in enumerate(self.live)}

    @cached_property
    def _extra(self) -> dict[Term, int]:
        return {term: i for i, term in enumerate(self.extra)}
