"""The modulation of a whole trajectory, computed before it starts from the live parameters."""

from typing import NamedTuple

import torch
from torch import Tensor

from ebcache_fast.models.denoiser import Denoiser


class StepModulation(NamedTuple):
    """One step's vectors, a row of the batch each."""

    layers: Tensor  # (L, branches, 3, N, D): shift and scale before the branch, gate after it
    head: Tensor  # (2, N, D): shift, scale

    def rows(self, rows: slice) -> "StepModulation":
        """The same for some rows of the batch."""
        return StepModulation(self.layers[..., rows, :], self.head[:, rows])


class ModulationTable:
    """All steps' modulation for a batch of labels; equal labels, the null label above all, are stored once.

    Timesteps and labels are known before sampling, so no step runs the conditioning MLPs. The table belongs
    to its trajectory: no copy of a weight's product outlives it.
    """

    def __init__(self, denoiser: Denoiser, timesteps: tuple[int, ...], labels: Tensor) -> None:
        distinct, self._row_of = torch.unique(labels, return_inverse=True)
        t = torch.tensor(timesteps, device=labels.device)
        self._layers, self._head = denoiser.modulation(t, distinct)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._layers.nbytes + self._head.nbytes

    def step(self, i: int) -> StepModulation:
        """The vectors of executed step ``i``, one for each row of the batch."""
        return StepModulation(
            self._layers[i].index_select(3, self._row_of), self._head[i].index_select(1, self._row_of)
        )
