"""The modulation of a whole trajectory, computed before it starts from the live parameters."""

import torch
from torch import Tensor

from ebcache_fast.models.denoiser import Denoiser
from ebcache_fast.operands import At, Norm


class ModulationTable:
    """All steps' modulation for a batch of labels; equal labels, the null label above all, are stored once.

    Timesteps and labels are known before sampling, so no step runs the conditioning MLPs. The table belongs
    to its trajectory: no copy of a weight's product outlives it.
    """

    def __init__(self, denoiser: Denoiser, timesteps: tuple[int, ...], labels: Tensor) -> None:
        distinct, row_of = torch.unique(labels, return_inverse=True)
        t = torch.tensor(timesteps, device=labels.device)
        self.layers, self.head = denoiser.modulation(t, distinct)  # (S, L, branches, 3, U, D), (S, 2, U, D)
        self._row_of = row_of.int()
        self._steps = torch.arange(len(timesteps), dtype=torch.int32, device=labels.device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.layers.nbytes + self.head.nbytes

    def at(self, i: int) -> At:
        """Where executed step ``i`` reads."""
        return At(self._steps[i : i + 1], self._row_of)

    def norm(self, layer: int, branch: int, eps: float) -> Norm:
        """The LayerNorm before a branch, counted within its layer."""
        return Norm(self.layers[:, layer, branch, 0], self.layers[:, layer, branch, 1], eps)

    def head_norm(self, eps: float) -> Norm:
        """The LayerNorm before the last linear map."""
        return Norm(self.head[:, 0], self.head[:, 1], eps)

    def gate(self, layer: int, branch: int) -> Tensor:
        """The gate of a branch's output, (S, U, D)."""
        return self.layers[:, layer, branch, 2]

    def gates(self) -> Tensor:
        """The gates of all slots in the order of execution, (S, K, U, D)."""
        return self.layers[:, :, :, 2].flatten(1, 2)
