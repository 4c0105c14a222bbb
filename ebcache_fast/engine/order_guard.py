"""A check on the device that a step was called with the timestep and labels that it is for."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class OrderGuard(NamedTuple):
    """Static memory for the check; timesteps and labels are exact in float64."""

    given: Tensor  # (2, R) float64: timesteps, then labels, of this call
    given_timesteps: Tensor  # (R,), its first row
    given_labels: Tensor  # (R,), its second
    planned: Tensor  # (S, 2, R) float64: the same of every step
    broken: Tensor  # (1,) bool: whether any step since the start was called with others

    @classmethod
    def of(cls, rows: int, steps: int, device: torch.device) -> Self:
        """Memory for a batch of so many rows."""
        given = torch.zeros(2, rows, dtype=torch.float64, device=device)
        return cls(given, given[0], given[1], given.new_zeros(steps, 2, rows), given.new_zeros(1, dtype=torch.bool))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What it consists of."""
        return self.given, self.planned, self.broken

    def load(self, timesteps: tuple[float, ...], labels: Tensor) -> None:
        """Expect these timesteps, in this order, and labels (R,)."""
        planned = self.planned[: len(timesteps)]
        planned[:, 0] = planned.new_tensor(timesteps).unsqueeze(1)
        planned[:, 1] = labels
        self.broken.zero_()

    def give(self, t: Tensor, y: Tensor) -> None:
        """What this call was made with, (R,) each."""
        self.given_timesteps.copy_(t, non_blocking=True)  # t may lie on the host, where a copy would wait
        self.given_labels.copy_(y)

    def check(self, step: Tensor, out: Tensor) -> None:
        """Fill ``out`` with NaN unless this call is that of ``step`` (1,)."""
        wrong = (self.given != self.planned.index_select(0, step)).any()
        self.broken.logical_or_(wrong)
        out.masked_fill_(wrong, float("nan"))
