"""What rules write a step's program with: a few primitives, and all fusing behind them."""

from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter

from ebcache_fast.plan.memory import Memory
from ebcache_fast.plan.program import (
    BRANCH,
    EMBED,
    EMBED_NORM,
    HEAD,
    RESIDUAL,
    RESIDUAL_NORM,
    RESIDUAL_QUANTISE,
    RUN,
    SUM,
    SUMS,
    WITHOUT_STEP,
    Launch,
    Slot,
    Term,
)
from ebcache_fast.plan.sites import SiteShape

FUSED_TERMS = 2  # that one fused launch adds


class Emitter:
    """Collects the launches of one step. Terms wait until somebody needs the stream, and are added with what does.

    memory: where slots lie. float8: sites that take their input so.
    """

    def __init__(self, sites: Sequence[SiteShape], memory: Memory, float8: frozenset[int] = frozenset()) -> None:
        self._sites, self._memory, self._float8 = sites, memory, float8
        self._launches: list[Launch] = []
        self._pending: list[Term] = []
        self._held: list[Term] = []  # of a group of parallel sites that is not done
        self._is_embedded = False
        self._has_input = False  # the group's

    def begin(self, site: int) -> None:
        """Go on to a site; one that runs in parallel with the one before shares its input."""
        if not self._sites[site].is_parallel:
            self._pending += self._held
            self._held, self._has_input = [], False

    def input(self, site: int) -> None:
        """What the branch of a site takes: the stream up to date, normalised and modulated."""
        if self._has_input:
            return
        self._has_input = True
        if not self._sites[site].is_normed:
            self.stream()
        elif site in self._float8:
            self._embed()
            self._emit(RESIDUAL_QUANTISE, self._last_terms(), site)
        elif self._is_embedded or self._pending:
            self._embed()
            self._emit(RESIDUAL_NORM, self._last_terms(), site)
        else:
            self._is_embedded = True
            self._emit(EMBED_NORM, (), site)

    def branch(self, site: int, out: Slot) -> None:
        """Run the branch of a site over its input into a slot."""
        self._emit(BRANCH, (), site, out)

    def add(self, slot: Slot, gate: int | None, *, is_weighted: bool = False) -> None:
        """Add gate x factor x slot to the stream."""
        self._held.append(Term(slot, gate, is_weighted))

    def stream(self) -> None:
        """Bring the stream up to date."""
        self._embed()
        if last := self._last_terms():
            self._emit(RESIDUAL, last)

    def end(self, *, samples: bool) -> tuple[Launch, ...]:
        """Finish the step, of our own sampler's loop or of another's that wants the output; returns the launches.

        Steps that only add what one launch can sum are so many at once in our own loop.
        """
        self._pending, self._held = self._pending + self._held, []
        if samples and not self._launches and self._pending and self._longest_stretch()[1] == len(self._pending):
            self._emit(SUMS, tuple(self._pending))
            self._emit(RUN)
            return tuple(self._launches)
        self._embed()
        last = self._last_terms()
        if WITHOUT_STEP.issuperset(launch.name for launch in self._launches):
            self._add(last)  # a step's first launch takes over the step, its last hands it on
            last = ()
        self._emit(HEAD, last)
        return tuple(self._launches)

    def _embed(self) -> None:
        if not self._is_embedded:
            self._is_embedded = True
            self._emit(EMBED)

    def _last_terms(self) -> tuple[Term, ...]:
        """Add what is pending but for what one fused launch can take, longest stretches first, and return the rest."""
        while len(self._pending) > FUSED_TERMS:
            start, count = self._longest_stretch()
            if count <= FUSED_TERMS:
                start, count = 0, FUSED_TERMS
            self._add(tuple(self._pending[start : start + count]))
            del self._pending[start : start + count]
        last = tuple(self._pending)
        self._pending.clear()
        return last

    def _longest_stretch(self) -> tuple[int, int]:
        """Where among the pending terms most lie one after another, and how many."""
        start, longest = 0, (0, 1)
        for i, (one, other) in enumerate(pairwise(self._pending), start=1):
            start = start if self._memory.are_neighbours(one, other) else i
            longest = max(longest, (start, i + 1 - start), key=itemgetter(1))
        return longest

    def _add(self, terms: tuple[Term, ...]) -> None:
        self._emit(SUM if len(terms) > FUSED_TERMS else RESIDUAL, terms)

    def _emit(self, name: str, terms: tuple[Term, ...] = (), site: int = -1, out: Slot | None = None) -> None:
        self._launches.append(Launch(name, terms, site, out))
