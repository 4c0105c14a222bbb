"""A check on the device that a step was called with the timestep and labels that it is for."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class OrderGuard(NamedTuple):
    """Static memory for the check; timesteps and labels are exact in float64."""

    call: Tensor  # (2, R) float64: timesteps, then labels, of this call
    timesteps: Tensor  # (R,), its first row
    labels: Tensor  # (R,), its second
    planned: Tensor  # (S, 2, R) float64: the same of every step
    broken: Tensor  # (1,) bool: whether any step since the start was called with others

    @classmethod
    def of(cls, rows: int, steps: int, device: torch.device) -> Self:
        """Allocate the memory for a batch of so many rows, and so many steps."""
        call = torch.zeros(2, rows, dtype=torch.float64, device=device)
        return cls(call, call[0], call[1], call.new_zeros(steps, 2, rows), call.new_zeros(1, dtype=torch.bool))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors of the check: this call's, the planned ones, and the finding."""
        return self.call, self.planned, self.broken

    def load(self, timesteps: tuple[float, ...], labels: Tensor) -> None:
        """Expect these timesteps, in this order, and labels (R,)."""
        planned = self.planned[: len(timesteps)]
        planned[:, 0] = planned.new_tensor(timesteps).unsqueeze(1)
        planned[:, 1] = labels
        self.broken.zero_()

    def give(self, t: Tensor, y: Tensor) -> None:
        """Take the timesteps and labels of this call, (R,) each."""
        self.timesteps.copy_(t, non_blocking=True)  # t may lie on the host, where a copy would wait
        self.labels.copy_(y)

    def check(self, step: Tensor, out: Tensor) -> None:
        """Fill ``out`` with NaN unless this call is that of ``step`` (1,)."""
        wrong = (self.call != self.planned.index_select(0, step)).any()
        self.broken.logical_or_(wrong)
        out.masked_fill_(wrong, float("nan"))
