"""Which step is at hand: a count on the device, which the operations of a step hand on to each other."""

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from ebcache_fast.operands import Advance, At


class StepClock:
    """The executed step, as a row of the modulation table.

    A step's first operation takes over what the last one before it handed on; all others read what it took. No
    operation writes what it reads, because its own programs run in any order.
    """

    def __init__(self, device: torch.device) -> None:
        self._now = torch.zeros(1, dtype=torch.int32, device=device)
        self._next = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def now(self) -> Tensor:
        """The step at hand, (1,) int32, once its first operation ran."""
        return self._now

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The step at hand and the next one, (1,) int32 each."""
        return self._now, self._next

    def set(self, step: int) -> None:
        """Make ``step`` the next one."""
        self._next.fill_(step)

    def reads(self, row_of: Tensor) -> Iterator[At]:
        """Where the operations of a step read, one after another, but for its last."""
        yield At(self._next, row_of, Advance(self._now, 0))
        yield from repeat(At(self._now, row_of))

    def last(self, row_of: Tensor, steps: int = 1) -> At:
        """Where the last operation reads, after which ``steps`` are done."""
        return At(self._now, row_of, Advance(self._next, steps))
