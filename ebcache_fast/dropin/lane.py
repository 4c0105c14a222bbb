"""The runs in progress that came with the same tensors, told apart by where they stand."""

from collections import Counter
from dataclasses import dataclass, field

from ebcache_fast.engine.fingerprint import Fingerprint
from ebcache_fast.engine.numerics import Numerics
from ebcache_fast.engine.trajectory import ForwardTrajectory


@dataclass(eq=False)
class Lane:
    """One run in progress, and the memory for its caches."""

    trajectory: ForwardTrajectory
    weights: Fingerprint
    expected: int = 0  # the step that comes next
    goes_back: bool = False  # its last call was of the step before the one of the call before
    is_doubtful: bool = False  # its tensors are gone, and never came anew so far
    calls: int = 0
    hits: int = 0  # calls that reused something
    lanes: "Lanes | None" = None  # among which it is kept

    def why_over(self, weights: Fingerprint, numerics: Numerics) -> str | None:
        """Why its caches are of no use now, if they are not."""
        if self.weights != weights:
            return "weights changed within a run"
        same = numerics == self.trajectory.place.spec.numerics  # under which it began
        return None if same else "torch's settings or functions changed within a run"

    @property
    def rises(self) -> bool:
        """Whether its steps come in rising order of timesteps, as in an inversion, so that step 0 is its last."""
        return self.goes_back and self.expected == 2


@dataclass(eq=False)
class Lanes:
    """The unfinished runs that came with the same tensors, by the step that each expects.

    A call is the next one of the run that expects its step, unless another expects it too, or has just made it and may
    make it again, as samplers do that visit a timestep twice. Then it could be either's.
    """

    is_made_anew: bool = False  # the tensors came in the middle of a run
    is_held: bool = False  # and they came again: whoever has them keeps them
    gave_way: bool = False  # a run lost its caches to others, beyond max_trajectories
    is_repeating: bool = False  # a timestep came twice, or may have
    at: dict[int, Lane] = field(default_factory=dict)
    lost: Counter[int] = field(default_factory=Counter)  # runs without caches; too many rather than too few
    ends: set[int] = field(default_factory=set)  # one past the last steps of runs that may make those again

    @property
    def runs(self) -> int:
        """How many there may be."""
        return len(self.at) + self.lost.total()

    def next_of(self, step: int) -> Lane | None:
        """The run whose next step this is, if that is certain."""
        lane = self.at.get(step)
        return None if lane is None or lane.is_doubtful or step + 1 in self.at or self.may_make(step) else lane

    def may_make(self, step: int) -> bool:
        """Whether a run without caches may be at this step, or come back to it."""
        return self.lost[step] > 0 or self.lost[step + 1] > 0 or step + 1 in self.ends

    def take(self, others: "Lanes") -> None:
        """Add what is known of other runs but for their lanes."""
        self.is_repeating |= others.is_repeating
        self.lost += others.lost
        self.ends |= others.ends

    def spare(self, step: int | None) -> Lane | None:
        """A lane for a call that nothing tells the run of: the caches there are nobody's any more."""
        near = next((self.at[one] for one in (step, -1 if step is None else step + 1) if one in self.at), None)
        return near or next(iter(self.at.values()), None)

    def put(self, lane: Lane, expected: int) -> Lane | None:
        """Let a run stand there; returns the lane that stood there before, whose run has no caches from now on."""
        before = self.at.pop(expected, None)
        if before is not None:
            before.lanes = None
            self.lost[expected] += 1
        self.at[expected], lane.lanes, lane.expected = lane, self, expected
        return before

    def remove(self, lane: Lane, *, lose: bool = False) -> None:
        """Take a lane out; ``lose`` where its run may go on."""
        del self.at[lane.expected]
        lane.lanes = None
        if lose and lane.expected:
            self.lost[lane.expected] += 1
