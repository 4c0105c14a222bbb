"""Programs: the launches of one step, between plans and kernels; hashed, verified, counted and printed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

from ebcache_fast.plan.sites import Site

_Group = tuple[int, tuple[str, ...]]  # a layer, and the lines that name it as {0} and the one before it as {1}

# What slots hold.
OUTPUT = "output"  # of one site: the branch's ungated output
REST = "rest"  # of one site, and the width after it: what full attention adds to attention within a window
CHANGE = "change"  # of several sites: what they add to the stream, gated
MARK = "mark"  # the stream as it was before several sites
WINDOW = "window"  # an output of attention within a window
WITHIN_A_STEP = frozenset({MARK, WINDOW})  # which no later step reads

# Which launches there are; all but `WITHOUT_STEP` read which step it is.
EMBED = "embed"  # h = tokens of x
EMBED_NORM = "embed_norm"  # the same, and u = the input of a site
RESIDUAL = "residual"  # h += terms
RESIDUAL_NORM = "residual_norm"  # the same, and u = the input of a site
RESIDUAL_QUANTISE = "residual_quantise"  # the same, u in float8
SUM = "sum"  # h += terms of neighbouring slots
SUMS = "sums"  # a sum of neighbouring slots for each of some coming steps, without x
HEAD = "head"  # output, or the sampler's step, of h + terms
RUN = "run"  # as many whole steps as there are sums
BRANCH = "branch"  # out = the branch of a site over its input, or over the chosen tokens of it
SELECT = "select"  # choose the tokens of which a slot is largest
GATHER = "gather"  # take them from the input
SCATTER = "scatter"  # put them into a slot
COPY = "copy"  # out = h
SUBTRACT = "subtract"  # out = one slot, or h, less another
WITHOUT_STEP = frozenset({EMBED, BRANCH, SELECT, GATHER, SCATTER, COPY, SUBTRACT})
LONGEST_RUN = 3  # steps of which one pass over the slots makes the sums


class Slot(NamedTuple):
    """Kept value: of one site, or of all sites from ``first`` to ``last``.

    ``age`` tells several kept outputs of one site apart. ``meaning`` is part of the key, so that what is left of a
    difference can't be read as an output.
    """

    meaning: str
    first: int
    last: int
    age: int = 0

    @classmethod
    def of(cls, site: int, age: int = 0, meaning: str = OUTPUT) -> "Slot":
        """The slot of one site, counted through the model."""
        return cls(meaning, site, site, age)


class Term(NamedTuple):
    """Summand of the residual stream: gate x factor x slot."""

    slot: Slot
    gate: int | None  # of which site; None for 1
    law: str = ""  # of `factors.LAWS`, which makes a factor for each step; none is 1


class Launch(NamedTuple):
    """Launch of one kernel; that of a branch stands for its few matrix products and its attention."""

    name: str
    terms: tuple[Term, ...] = ()  # added to the stream, in this order
    site: int = -1  # of which the input is made, or the branch is run
    out: Slot | None = None  # what is written
    sources: tuple[Slot | None, ...] = ()  # what is read besides terms; None for the stream
    window: int = 0  # of the branch's attention, in tokens; 0 for all of them
    tokens: int = 0  # how many are chosen; 0 for all of them
    is_shared: bool = False  # the conditional rows' output is the unconditional ones' too


@dataclass(frozen=True)
class Program:
    """Launches of one step, in order; of ``steps`` equal ones that reuse everything, where there are more.

    Hashable: it is a CUDA graph's key. str() is for people.
    """

    launches: tuple[Launch, ...]
    sites: tuple[Site, ...]  # of the model
    steps: int = 1

    def __len__(self) -> int:
        return len(self.launches)

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.launches)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.launches, self.steps))

    @cached_property
    def writes(self) -> frozenset[Slot]:
        """Slots that the program fills."""
        return frozenset(launch.out for launch in self if launch.out is not None)

    @cached_property
    def reads(self) -> tuple[Slot, ...]:
        """Slots that the program reads as an earlier step left them, in order."""
        found: dict[Slot, None] = {}
        written: set[Slot] = set()
        for launch in self:
            slots = (*(term.slot for term in launch.terms), *filter(None, launch.sources))
            found |= dict.fromkeys(slot for slot in slots if slot not in written)
            if launch.out is not None:
                written.add(launch.out)
        return tuple(found)

    @cached_property
    def branches(self) -> tuple[int, ...]:
        """Sites of which the branch runs, in order."""
        return tuple(launch.site for launch in self if launch.name == BRANCH)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(program: Program) -> Iterator[str]:
    """Program as text, one line a launch; layers that are alike but for their number stand once."""
    groups = _by_layer(program)
    while groups:
        layer, lines = groups[0]
        alike = _alike(groups)
        several = alike > 1
        yield from (line.format("i" if several else layer, "i-1" if several else layer - 1) for line in lines)
        if several:
            yield f"    for i = {layer} to {layer + alike - 1}"
        groups = groups[alike:]


def _alike(groups: Sequence[_Group]) -> int:
    """Count the first group, and those after it that say the same of one layer after another."""
    first, lines = groups[0]
    return len(list(takewhile(lambda numbered: numbered[1] == (first + numbered[0], lines), enumerate(groups))))


def _by_layer(program: Program) -> list[_Group]:
    """The lines of each stretch of launches for one layer, which they name as {0}, and the one before it as {1}."""
    found: list[tuple[int, list[str]]] = []
    for launch in program:
        layer = launch.site if launch.site < 0 else program.sites[launch.site].layer
        if not found or found[-1][0] != layer:
            found.append((layer, []))
        found[-1][1].append(_line(launch, program, layer))
    return [(layer, tuple(lines)) for layer, lines in found]


def _line(launch: Launch, program: Program, layer: int) -> str:
    parts = [f"{launch.name:<18}"]
    if launch.site >= 0:
        parts.append(_named(program.sites[launch.site], layer))
    parts.append(_terms(launch.terms, program, layer))
    sources = ("the stream" if slot is None else _slot(slot, program, layer) for slot in launch.sources)
    parts += ["of " + " less ".join(sources)] * bool(launch.sources)
    parts += [f"{name} {value}" for name in ("window", "tokens") if (value := getattr(launch, name))]
    parts += ["for both"] * launch.is_shared
    if launch.out is not None and launch.out != Slot.of(launch.site):
        parts.append(f"-> {_slot(launch.out, program, layer)}")
    if program.steps > 1:
        parts.append(f"x {program.steps}")
    return "  ".join(part for part in parts if part).rstrip()


def _terms(terms: tuple[Term, ...], program: Program, layer: int) -> str:
    if not terms:
        return ""
    if len(terms) > 3:
        return f"+ {_slot(terms[0].slot, program, layer)} .. {_slot(terms[-1].slot, program, layer)} ({len(terms)})"
    return " ".join(f"+ {term.law and f'{term.law} '}{_slot(term.slot, program, layer)}" for term in terms)


def _slot(slot: Slot, program: Program, layer: int) -> str:
    first, last = program.sites[slot.first], program.sites[slot.last]
    where = _named(first, layer) if slot.first == slot.last else f"{_named(first, layer)}..{_named(last, layer)}"
    return where + f" {slot.meaning}" * (slot.meaning != OUTPUT) + f" [{slot.age}]" * (slot.age > 0)


def _named(site: Site, layer: int) -> str:
    """A site relative to a layer, for `str.format`."""
    number = {layer: "{0}", layer - 1: "{1}"}.get(site.layer, str(site.layer))
    return f"{number}.{site.branch.value}"
