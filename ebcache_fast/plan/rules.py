"""Rules for one site: what a step may do there, said in the emitter's primitives."""

from dataclasses import dataclass
from typing import Protocol

from ebcache_fast.errors import TableError
from ebcache_fast.plan.emitter import Emitter
from ebcache_fast.plan.factors import LAWS
from ebcache_fast.plan.program import REST, WINDOW, Slot
from ebcache_fast.plan.sites import Branch, Site

MAX_ORDER = 4  # of a forecast


class Rule(Protocol):
    """Rule of one site, hashable and without state: it only appends to an emitter."""

    @property
    def runs_branch(self) -> bool:
        """True if the branch of its site runs, wholly or in part."""
        ...

    def check(self, site: Site) -> None:
        """Raise TableError for a site that can't take it."""
        ...

    def emit(self, site: int, emitter: Emitter) -> None:
        """Say what is done at a site, counted through the model."""
        ...


@dataclass(frozen=True)
class Compute:
    """Run the branch, and keep its output; ``age`` says as which of several."""

    age: int = 0
    runs_branch = True

    def check(self, site: Site) -> None:
        if type(self.age) is not int or self.age < 0:
            raise TableError(f"{site}: age: expected 0 or more, got {self.age!r}")

    def emit(self, site: int, emitter: Emitter) -> None:
        emitter.input(site)
        emitter.branch(site, Slot.of(site, self.age))
        emitter.add(Slot.of(site, self.age), site)

    def __str__(self) -> str:
        return "COMPUTE"


@dataclass(frozen=True)
class Refill:
    """Run the branch, and keep its output as each of ``ages`` kept ones: all that `Forecast` reads of a new run."""

    ages: int
    runs_branch = True

    def check(self, site: Site) -> None:
        if type(self.ages) is not int or self.ages < 1:
            raise TableError(f"{site}: ages: expected 1 or more, got {self.ages!r}")

    def emit(self, site: int, emitter: Emitter) -> None:
        COMPUTE.emit(site, emitter)
        for age in range(1, self.ages):
            emitter.copy(Slot.of(site, age), Slot.of(site))


@dataclass(frozen=True)
class Reuse:
    """Add the output that is kept, with this step's gate."""

    age: int = 0
    runs_branch = False

    def check(self, site: Site) -> None:
        if type(self.age) is not int or self.age < 0:
            raise TableError(f"{site}: age: expected 0 or more, got {self.age!r}")

    def emit(self, site: int, emitter: Emitter) -> None:
        emitter.add(Slot.of(site, self.age), site)

    def __str__(self) -> str:
        return "REUSE"


@dataclass(frozen=True)
class Forecast:
    """Add what the last ``order`` + 1 outputs that were computed forecast by a law, with this step's gate.

    They are kept by `Compute` of ages 0 to ``order``, in turn. law: one of `factors.LAWS`.
    Source: TaylorSeer, Liu et al., arXiv 2503.06923.
    """

    order: int
    law: str = "taylor"
    runs_branch = False

    def check(self, site: Site) -> None:
        check_forecast(f"{site}", self.order, self.law)

    def emit(self, site: int, emitter: Emitter) -> None:
        for age in range(self.order + 1):
            emitter.add(Slot.of(site, age), site, law=self.law)


@dataclass(frozen=True)
class Tokens:
    """Run the MLP over the ``count`` tokens of which the kept output is largest, and reuse that of all others.

    Source: token-wise caching, Zou et al., arXiv 2410.05317, section 3.2; the score is the norm of what is kept.
    """

    count: int
    runs_branch = True

    def check(self, site: Site) -> None:
        if site.branch is not Branch.MLP:
            raise TableError(f"{site}: tokens: expected MLP, which mixes none, got {site.branch.name}; use REUSE there")
        if type(self.count) is not int or self.count < 1:
            raise TableError(f"{site}: tokens: expected 1 or more, got {self.count!r}; use REUSE for none")

    def emit(self, site: int, emitter: Emitter) -> None:
        emitter.check_tokens(site, self.count)
        emitter.input(site, is_plain=True)
        emitter.branch_of_tokens(site, Slot.of(site), self.count)
        emitter.add(Slot.of(site), site)


@dataclass(frozen=True)
class Window:
    """Run self-attention within a window of ``width`` tokens, and add what full attention added to that when kept.

    Source: DiTFastAttn, Yuan et al., arXiv 2406.08552, window attention with residual sharing; the difference is taken
    after the output projection, which is linear.
    """

    width: int
    runs_branch = True

    def check(self, site: Site) -> None:
        if site.branch is not Branch.SELF_ATTN:
            raise TableError(f"{site}: window: expected SELF_ATTN, got {site.branch.name}; use COMPUTE or REUSE there")
        if type(self.width) is not int or self.width < 1:
            raise TableError(f"{site}: window: expected 1 token or more, got {self.width!r}")

    def emit(self, site: int, emitter: Emitter) -> None:
        emitter.input(site)
        emitter.branch(site, Slot.of(site, meaning=WINDOW), window=self.width)
        emitter.add(Slot.of(site, meaning=WINDOW), site)
        emitter.add(self.rest(site), site)

    def rest(self, site: int) -> Slot:
        """The slot of what full attention adds to attention within a window of this width, and no other."""
        return Slot.of(site, meaning=f"{REST} {self.width}")


@dataclass(frozen=True)
class FullAndWindow(Window):
    """Run self-attention, keep its output, and what it adds to attention within a window, for `Window` to add."""

    def emit(self, site: int, emitter: Emitter) -> None:
        output, window = Slot.of(site), Slot.of(site, meaning=WINDOW)
        emitter.input(site)
        emitter.branch(site, output)
        emitter.branch(site, window, window=self.width)
        emitter.subtract(output, window, self.rest(site))
        emitter.add(output, site)


@dataclass(frozen=True)
class SharedByGuidance:
    """Run the branch for the conditional rows alone, and keep its output for the unconditional ones too.

    Source: DiTFastAttn, Yuan et al., arXiv 2406.08552, attention sharing across CFG.
    """

    runs_branch = True

    def check(self, site: Site) -> None:
        if site.branch is Branch.CROSS_ATTN:
            raise TableError(f"{site}: a share: rows attend to texts of their own there; use COMPUTE or REUSE")

    def emit(self, site: int, emitter: Emitter) -> None:
        emitter.check_guided(site)
        emitter.input(site)
        emitter.branch(site, Slot.of(site), is_shared=True)
        emitter.add(Slot.of(site), site)


def check_forecast(where: str, order: object, law: object) -> None:
    """Raise TableError for an order or a law of a forecast that there is not."""
    if type(order) is not int or not 0 <= order <= MAX_ORDER:
        raise TableError(f"{where}: order: expected 0 to {MAX_ORDER}, got {order!r}; differences of more are noise")
    if not isinstance(law, str) or law not in LAWS:
        raise TableError(f"{where}: law: expected one of {', '.join(LAWS)}, got {law!r}")


COMPUTE, REUSE = Compute(), Reuse()
