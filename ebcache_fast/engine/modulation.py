"""The modulation of a whole trajectory, computed before it starts from the live parameters."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ebcache_fast.models.base import Conditioning, Denoiser, Modulation
from ebcache_fast.ops.operands import Norm
from ebcache_fast.plan import Term

Factors = Sequence[Sequence[float]]  # of each step, of each extra term


def count_distinct(conditions: Tensor) -> int:
    """Number of different conditions (N,); waits for the device."""
    return len(torch.unique(conditions))


class ModulationTable:
    """Static memory for the modulation of ``steps`` steps and ``conditions`` distinct ones, read by ``rows`` rows.

    extra: terms that have gates of their own besides the sites': with a factor of each step's, or without a gate.
    A row is one of the batch, or a single token of one where tokens of a row differ in their conditions.

    Timesteps and labels are known before sampling, so no step runs the conditioning MLPs. What it holds belongs to
    one trajectory: no product of a weight outlives that.
    """

    def __init__(self, denoiser: Denoiser, steps: int, conditions: int, rows: int, extra: Sequence[Term] = ()) -> None:
        self._denoiser = denoiser
        shape, weight = denoiser.shape, denoiser.weight()
        sites, more = len(shape.sites), -(-len(extra) // 3)  # one table: the operations take gates of equal strides
        self._vectors = weight.new_empty(steps, sites + more, 3, conditions, shape.width)
        self.sites, self._extra = self._vectors[:, :sites], self._vectors[:, sites:].flatten(1, 2)
        self._terms = tuple(extra)
        self.head = weight.new_empty(steps, 2, conditions, shape.width)
        self.row_of = torch.zeros(rows, dtype=torch.int32, device=weight.device)
        self._distinct = self.row_of.new_zeros(1, dtype=torch.int64)
        self._context: Conditioning = ()

    @classmethod
    def of(cls, denoiser: Denoiser, timesteps: tuple[float, ...], labels: Tensor, context: Conditioning = ()) -> Self:
        """A table of the very size that these steps, labels (R,) and their context need, filled."""
        conditions = denoiser.conditions(labels)
        table = cls(denoiser, len(timesteps), count_distinct(conditions), len(conditions))
        table.load(timesteps, labels, context)
        return table

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of the table: vectors, the head's, and each row's condition."""
        return self._vectors, self.head, self.row_of

    def load(
        self, timesteps: tuple[float, ...], labels: Tensor, context: Conditioning = (), factors: Factors | None = None
    ) -> None:
        """Fill the rows of these steps for labels (R,); equal labels, the null label above all, are stored once.

        factors: of each extra term at each step; 1 where they are not given.
        """
        self._distinct, row_of = torch.unique(self._denoiser.conditions(labels), return_inverse=True)
        self._context = context
        self.row_of.copy_(row_of)
        self._fill(0, timesteps)
        for step, of_step in enumerate(factors or ()):
            for i, (term, factor) in enumerate(zip(self._terms, of_step, strict=True)):
                if term.gate is None:
                    self._extra[step, i] = factor
                else:
                    torch.mul(self.sites[step, term.gate, 2], factor, out=self._extra[step, i])

    @property
    def context(self) -> Conditioning:
        """Conditioning of the last `load`."""
        return self._context

    def load_row(self, step: int, t: float) -> None:
        """Fill one row for this timestep, and the labels of the last `load`."""
        self._fill(step, (t,))

    def norm(self, site: int, norm: nn.LayerNorm) -> Norm:
        """The LayerNorm before the branch of a site, with its modulation."""
        return _modulated(norm, self.sites[:, site])

    def head_norm(self, norm: nn.LayerNorm) -> Norm:
        """The LayerNorm before the last linear map, with its modulation."""
        return _modulated(norm, self.head)

    def gate(self, column: tuple[bool, int]) -> Tensor:
        """Gate of a column, from `Memory.column_of`, (S, U, D)."""
        is_extra, place = column
        return self._extra[:, place] if is_extra else self.sites[:, place, 2]

    def gates(self, column: tuple[bool, int], count: int) -> Tensor:
        """The gates of so many columns from this one on, (S, count, U, D)."""
        is_extra, first = column
        columns = slice(first, first + count)
        return self._extra[:, columns] if is_extra else self.sites[:, columns, 2]

    def _fill(self, first: int, timesteps: tuple[float, ...]) -> None:
        steps, conditions = slice(first, first + len(timesteps)), len(self._distinct)
        out = Modulation(self.sites[steps, ..., :conditions, :], self.head[steps, :, :conditions])
        t = torch.tensor(timesteps, dtype=torch.float64, device=self.row_of.device)
        self._denoiser.modulation(t, self._distinct, self._context, out)


def _modulated(norm: nn.LayerNorm, vectors: Tensor) -> Norm:
    """The norm with shift and scale, the first two of its vectors (S, 2 or 3, U, D)."""
    return Norm(vectors[:, 0], vectors[:, 1], norm.eps, norm.weight, norm.bias)
