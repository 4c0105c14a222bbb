"""One run in progress, as its caller's steps arrive."""

from dataclasses import dataclass
from weakref import ref

from torch import Tensor

from ebcache_fast.engine.fingerprint import Fingerprint
from ebcache_fast.engine.numerics import Numerics
from ebcache_fast.engine.step_scheduler import Arrival
from ebcache_fast.engine.trajectory import ForwardTrajectory
from ebcache_fast.errors import TrajectoryError


@dataclass
class Lane:
    """One run in progress. Runs are told apart by their labels, so that several may be interleaved."""

    trajectory: ForwardTrajectory
    weights: Fingerprint
    given: ref[Tensor]  # of the last call: its prompts, or labels
    began_anew: bool  # with the first step, before a run of the same labels had come to its end
    makes: int = 0  # of its context: how often that came in other tensors than before; 0 where there is none
    is_remade: bool = False  # at each step, so that other tensors mean nothing
    expected: int = 0  # the step that comes next
    is_shared: bool = False  # by two runs

    @property
    def numerics(self) -> Numerics:
        """Under which it began."""
        return self.trajectory.place.spec.numerics

    def is_begun_anew(self, arrival: Arrival) -> bool:
        """Whether the run that replaces this one may take turns with it; runs that were refused are over."""
        return not self.is_shared and (self.expected > 0 if arrival.step == 0 else self.began_anew)

    def is_taken_over(self, makes: int, given: Tensor) -> bool:
        """Whether another run goes on where this one is: its prompts or labels are equal, but other tensors.

        A loop that makes its prompts anew at each step looks alike once, and its labels never: it does not hold those
        of its last step.
        """
        last, self.given = self.given(), ref(given)
        is_held = last is not None and last is not given  # so that it is still somebody's
        is_other, self.makes = makes != self.makes if makes else is_held, makes
        is_taken, self.is_remade = is_other and (is_held or not self.is_remade), is_other
        return is_taken

    def refuse_twins(self, arrival: Arrival, t: float) -> None:
        """TrajectoryError where two runs of the same labels take turns, until one of them begins again.

        They look like a run that began anew, and then goes back to a step that it has done already. By then one of
        them may have read the other's caches, so neither may go on.
        """
        if arrival.step == 0:
            return
        again = arrival.step is not None and arrival.step < self.expected
        self.is_shared |= self.began_anew and again
        if self.is_shared:
            raise TrajectoryError(
                f"t={t:g} came in a second run, which began before the first of the same labels had come to its end: "
                "runs that take turns can only be told apart by their labels; begin again, one after the other"
            )
