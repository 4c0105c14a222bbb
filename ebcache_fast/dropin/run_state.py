"""State of the runs in progress: each by itself, and those that came with the same tensors."""

from collections import Counter
from dataclasses import dataclass, field

from ebcache_fast.engine.module_watch import ModuleState
from ebcache_fast.engine.trajectory import ForwardTrajectory


@dataclass(eq=False)
class RunState:
    """Run in progress, and the memory for its caches."""

    trajectory: ForwardTrajectory
    weights: ModuleState
    expected: int = 0  # the step that comes next
    goes_back: bool = False  # its last call was of the step before the one of the call before
    is_doubtful: bool = False  # its tensors are gone, and never came anew so far
    calls: int = 0
    hits: int = 0  # calls that reused something
    group: "Group | None" = None  # in which it is kept


@dataclass(eq=False)
class Group:
    """The unfinished runs that came with the same tensors; see `Standing`."""

    is_made_anew: bool = False  # the tensors came in the middle of a run
    is_held: bool = False  # and they came again: whoever has them keeps them
    gave_way: bool = False
    is_repeating: bool = False  # a timestep came twice, or may have
    at: dict[int, RunState] = field(default_factory=dict)
    lost: Counter[int] = field(default_factory=Counter)
    ends: set[int] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        """True if the group has no runs, with or without caches."""
        return not self.at and not self.lost.total()

    def take(self, others: "Group") -> None:
        """Add what is known of other runs but for those with caches."""
        self.is_repeating |= others.is_repeating
        self.lost += others.lost
        self.ends |= others.ends

    def put(self, run: RunState, expected: int) -> RunState | None:
        """Let a run stand there; returns the one that stood there before, which has no caches from now on."""
        before = self.at.pop(expected, None)
        if before is not None:
            before.group = None
            self.lost[expected] += 1
        self.at[expected], run.group, run.expected = run, self, expected
        return before

    def remove(self, run: RunState, *, lose: bool = False) -> None:
        """Take a run out of the group; ``lose`` where it may go on."""
        del self.at[run.expected]
        run.group = None
        if lose and run.expected:
            self.lost[run.expected] += 1
