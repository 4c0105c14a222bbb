"""The Emitter: a few primitives that rules write a step's program with, and all fusing behind them."""

from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter

from ebcache_fast.errors import TableError
from ebcache_fast.plan.memory import Memory
from ebcache_fast.plan.program import (
    BRANCH,
    COPY,
    EMBED,
    EMBED_NORM,
    GATHER,
    HEAD,
    RESIDUAL,
    RESIDUAL_NORM,
    RESIDUAL_QUANTISE,
    RUN,
    SCATTER,
    SELECT,
    SUBTRACT,
    SUM,
    SUMS,
    WITHOUT_STEP,
    Launch,
    Slot,
    Term,
)
from ebcache_fast.plan.sites import Site, SiteShape

FUSED_TERMS = 2  # that one fused launch adds


def check_tokens(site: Site, count: int, tokens: int) -> None:
    """Raise TableError if ``count`` tokens are to be chosen of fewer."""
    if count > tokens:
        raise TableError(f"{site}: tokens: expected at most the model's {tokens}, got {count}; use fewer")


class Emitter:
    """Collects the launches of one step. Terms wait until somebody needs the stream, and are added with what does.

    memory: where slots lie. float8: sites that take their input so. tokens: how many the stream has, is_guided: whether
    unconditional rows follow the conditional ones; None where that is not known yet.
    """

    def __init__(
        self,
        sites: Sequence[SiteShape],
        memory: Memory,
        float8: frozenset[int] = frozenset(),
        tokens: int | None = None,
        is_guided: bool | None = None,
    ) -> None:
        self._sites, self._memory, self._float8 = sites, memory, float8
        self._tokens, self._is_guided = tokens, is_guided
        self._launches: list[Launch] = []
        self._pending: list[Term] = []
        self._held: list[Term] = []  # of a group of parallel sites that is not done
        self._is_embedded = False
        self._has_input = False  # the group's

    def check_tokens(self, site: int, count: int) -> None:
        """Raise TableError if the model is known to have fewer than ``count`` tokens."""
        if self._tokens is not None:
            check_tokens(self._sites[site].site, count, self._tokens)

    def check_guided(self, site: int) -> None:
        """Raise TableError if the batch is known to be without guidance."""
        if self._is_guided is False:
            raise TableError(
                f"{self._sites[site].site}: a share needs classifier-free guidance, whose unconditional rows take it, "
                "and here is none; use COMPUTE there, or guide"
            )

    def begin(self, site: int) -> None:
        """Go on to a site; one that runs in parallel with the one before shares its input."""
        if not self._sites[site].is_parallel:
            self._pending += self._held
            self._held, self._has_input = [], False

    def input(self, site: int, *, is_plain: bool = False) -> None:
        """Make a branch's input: the stream up to date, normalised and modulated; ``is_plain``: not in float8."""
        if self._has_input:
            return
        self._has_input = True
        if not self._sites[site].is_normed:
            self._bring_up_to_date()
        elif site in self._float8 and not is_plain:
            self._embed()
            self._emit(RESIDUAL_QUANTISE, self._last_terms(), site)
        elif self._is_embedded or self._pending:
            self._embed()
            self._emit(RESIDUAL_NORM, self._last_terms(), site)
        else:
            self._is_embedded = True
            self._emit(EMBED_NORM, (), site)

    def branch(self, site: int, out: Slot, *, window: int = 0, is_shared: bool = False) -> None:
        """Run the branch of a site over its input into a slot.

        window: tokens that attention reaches, half of them on either side. is_shared: for the conditional rows alone,
        whose output is the unconditional ones' too.
        """
        self._launches.append(Launch(BRANCH, (), site, out, window=window, is_shared=is_shared))

    def branch_of_tokens(self, site: int, slot: Slot, tokens: int) -> None:
        """Run the branch of a site over the tokens of which a slot is largest, and put what it gives in their place."""
        self._launches += [
            Launch(SELECT, (), site, sources=(slot,), tokens=tokens),
            Launch(GATHER, (), site, tokens=tokens),
            Launch(BRANCH, (), site, tokens=tokens),
            Launch(SCATTER, (), site, slot, sources=(slot,), tokens=tokens),
        ]

    def copy(self, out: Slot, source: Slot | None = None) -> None:
        """Keep what a slot holds, or the stream as it is now."""
        if source is None:
            self.stream()
        self._launches.append(Launch(COPY, (), out=out, sources=(source,)))

    def subtract(self, minuend: Slot | None, subtrahend: Slot, out: Slot) -> None:
        """Keep the difference of two slots, or of the stream, None, and a slot."""
        if minuend is None:
            self.stream()
        self._launches.append(Launch(SUBTRACT, (), out=out, sources=(minuend, subtrahend)))

    def add(self, slot: Slot, gate: int | None, *, law: str = "") -> None:
        """Add gate x factor x slot to the stream."""
        self._held.append(Term(slot, gate, law))

    def stream(self) -> None:
        """Bring the stream up to date."""
        self._pending, self._held = self._pending + self._held, []
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
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
        """Start and length of the longest stretch of pending terms that lie one after another; (0, 1) if none do."""
        start, longest = 0, (0, 1)
        for i, (term, following) in enumerate(pairwise(self._pending), start=1):
            start = start if self._memory.are_neighbours(term, following) else i
            longest = max(longest, (start, i + 1 - start), key=itemgetter(1))
        return longest

    def _add(self, terms: tuple[Term, ...]) -> None:
        self._emit(SUM if len(terms) > FUSED_TERMS else RESIDUAL, terms)

    def _emit(self, name: str, terms: tuple[Term, ...] = (), site: int = -1, out: Slot | None = None) -> None:
        self._launches.append(Launch(name, terms, site, out))
