"""Count of steps on the device, which the operations of a step hand on to each other."""

import torch
from torch import Tensor

from ebcache_fast.ops.operands import Advance, StepIndex


class StepClock:
    """The executed step, as a row of the modulation table of which ``row_of`` (R,) says each batch row's condition.

    A step's first operation takes over what the last one before it handed on; all others read what it took. No
    operation writes what it reads, because its own programs run in any order.
    """

    def __init__(self, row_of: Tensor) -> None:
        self._now, self._next = (torch.zeros(1, dtype=torch.int32, device=row_of.device) for _ in range(2))
        self.first = StepIndex(self._next, row_of, Advance(self._now, 0))  # where a step's first operation reads
        self.here = StepIndex(self._now, row_of)  # where those between the first and the last do

    @property
    def now(self) -> Tensor:
        """The step at hand, (1,) int32, once its first operation ran."""
        return self._now

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The step at hand and the next one, (1,) int32 each."""
        return self._now, self._next

    def set(self, step: int) -> None:
        """Make ``step`` the next step."""
        self._next.fill_(step)

    def last(self, steps: int) -> StepIndex:
        """The place that a program's last operation reads at, after which ``steps`` are done."""
        return self.here._replace(advance=Advance(self._next, steps))
