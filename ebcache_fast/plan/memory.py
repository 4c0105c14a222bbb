"""Memory of a plan: the places of its slots, and the gates that its terms are multiplied by."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from ebcache_fast.plan.model_shape import ModelShape
from ebcache_fast.plan.program import WITHIN_A_STEP, Program, Slot, Term
from ebcache_fast.plan.sites import SiteShape


@dataclass(frozen=True)
class Memory:
    """Slots that some step reads, and terms that need a column of the gates' table besides the sites' own.

    A slot of a meaning lies beside those of the sites next to it, so that one launch can add them all. Slots that
    nobody reads share scratch.
    """

    live: tuple[Slot, ...] = ()
    extra: tuple[Term, ...] = ()
    unread: tuple[Slot, ...] = ()  # written, and read by nobody

    @classmethod
    def of(cls, programs: Iterable[Program]) -> Self:
        """The memory that these programs of a whole run need."""
        programs = tuple(programs)
        terms = {term for program in programs for launch in program for term in launch.terms}
        live = {slot for program in programs for slot in program.reads}
        written = {slot for program in programs for slot in program.writes if slot.meaning not in WITHIN_A_STEP}
        extra = (term for term in terms if term.law or term.gate is None)
        return cls(tuple(sorted(live)), tuple(sorted(extra)), tuple(sorted(written - live)))

    def scratches(self, site_shapes: Iterable[SiteShape]) -> dict[Slot, int]:
        """The number, from 0, of the scratch that each slot nobody reads is written to.

        One scratch serves all that wait for nothing at the same time: not the outputs of one group of parallel sites,
        nor what has different meanings.
        """
        places: list[int] = []  # in the group
        for shape in site_shapes:
            places.append(places[-1] + 1 if shape.is_parallel else 0)
        kinds = {slot: (slot.meaning, places[slot.first]) for slot in self.unread}
        number = {kind: i for i, kind in enumerate(sorted(set(kinds.values())))}
        return {slot: number[kind] for slot, kind in kinds.items()}

    def slots_for(self, shape: ModelShape) -> int:
        """Number of slots that have memory on a model: those that are live, and scratch."""
        return len(self.live) + len(set(self.scratches(shape.site_shapes).values()))

    def place_of(self, slot: Slot) -> int | None:
        """The place of a live slot among them, from 0; None for a slot that nobody reads."""
        return self._place.get(slot)

    def column_of(self, term: Term) -> tuple[bool, int]:
        """The gate of a term: True for an extra one, False for a site's own, and its column."""
        own = term.gate is not None and not term.law
        return (False, term.gate or 0) if own else (True, self._extra[term])

    def are_neighbours(self, term: Term, following: Term) -> bool:
        """True if the slot and the gate of ``following`` lie right after those of ``term``."""
        place, next_place = self._place.get(term.slot), self._place.get(following.slot)
        if place is None or next_place != place + 1:
            return False
        (is_extra, column), next_column = self.column_of(term), self.column_of(following)
        return next_column == (is_extra, column + 1)

    @cached_property
    def _place(self) -> dict[Slot, int]:
        return {slot: i for i, slot in enumerate(self.live)}

    @cached_property
    def _extra(self) -> dict[Term, int]:
        return {term: i for i, term in enumerate(self.extra)}
