"""What a contender is."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from bench.rivals.case import Case
from bench.rivals.loop import Run

Trajectory = Callable[[], Run]


@dataclass(frozen=True)
class Rival:
    """One way to run a case. ``make`` prepares what a user would keep between requests."""

    name: str
    what: str
    make: Callable[[Case], Trajectory]
    is_cached: bool = True  # else it computes every step
    is_another: bool = False  # a method of its own: its latents need not be ours
    is_rounded: bool = False  # ours, in fewer bits than the model has: its latents are ours but for that
    needs: tuple[str, ...] = ()  # modules

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed here."""
        return [name for name in self.needs if find_spec(name) is None]
