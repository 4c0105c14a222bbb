"""What a step may do at one site: a rule says it in the emitter's primitives."""

from dataclasses import dataclass
from typing import Protocol

from ebcache_fast.plan.emitter import Emitter
from ebcache_fast.plan.program import Slot


class Rule(Protocol):
    """Hashable and without state: it only appends to an emitter."""

    @property
    def runs_branch(self) -> bool:
        """Whether the branch of its site runs, wholly or in part."""
        ...

    def emit(self, site: int, emitter: Emitter) -> None:
        """Say what is done at a site, counted through the model."""
        ...


@dataclass(frozen=True)
class Compute:
    """Run the branch, and keep its output."""

    runs_branch = True

    def emit(self, site: int, emitter: Emitter) -> None:
        emitter.input(site)
        emitter.branch(site, Slot.of(site))
        emitter.add(Slot.of(site), site)

    def __str__(self) -> str:
        return "COMPUTE"


@dataclass(frozen=True)
class Reuse:
    """Add the output that is kept, with this step's gate."""

    runs_branch = False

    def emit(self, site: int, emitter: Emitter) -> None:
        emitter.add(Slot.of(site), site)

    def __str__(self) -> str:
        return "REUSE"


COMPUTE, REUSE = Compute(), Reuse()
