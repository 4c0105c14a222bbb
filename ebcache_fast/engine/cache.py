"""Memory of kept values between steps: one tensor of slots."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ebcache_fast.plan import Memory, ModelShape, Slot, Term


class FeatureCache:
    """Slots of a whole batch, guidance rows included, at fixed addresses; each is (N, T, D).

    Those that ``memory`` has live have memory of their own, one after another as they stand there. All others share
    scratch, because a branch must write somewhere even if no step ever reads it.
    """

    def __init__(self, shape: ModelShape, memory: Memory, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._memory, self._scratches = memory, memory.scratches(shape.site_shapes)
        count = memory.slots_for(shape)
        self._slots = torch.empty(count, rows, shape.tokens, shape.width, dtype=dtype, device=device)

    @classmethod
    def full(cls, shape: ModelShape, rows: int, dtype: torch.dtype, device: torch.device) -> "FeatureCache":
        """A cache in which the output of every site is live."""
        return cls(shape, every_output(shape), rows, dtype, device)

    @staticmethod
    def bytes_for(shape: ModelShape, memory: Memory, rows: int, dtype: torch.dtype) -> int:
        """Bytes that a cache of this size allocates."""
        return memory.slots_for(shape) * rows * shape.slot_elements * dtype.itemsize

    @property
    def shape(self) -> torch.Size:
        """Shape of a slot, (N, T, D)."""
        return self._slots.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache allocated."""
        return self._slots.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of the cache: one, of all its slots."""
        return (self._slots,)

    def slot(self, slot: Slot) -> Tensor:
        """The memory of one slot, (N, T, D)."""
        place = self._memory.place_of(slot)
        return self._slots[len(self._memory.live) + self._scratches[slot] if place is None else place]

    def output(self, site: int) -> Tensor:
        """The memory of a site's output, (N, T, D)."""
        return self.slot(Slot.of(site))

    def column_of(self, term: Term) -> tuple[bool, int]:
        """The gate of a term; see `Memory.column_of`."""
        return self._memory.column_of(term)

    def slots(self, first: Slot, count: int) -> Tensor:
        """View of ``count`` live slots, from ``first`` on, (count, N, T, D)."""
        place = self._memory.place_of(first) or 0
        return self._slots[place : place + count]

    def copy_rows(self, source: "FeatureCache", slots: Iterable[Slot], rows: Tensor) -> None:
        """Take over ``slots`` from ``source`` for the batch rows where ``rows`` (N,) bool is true."""
        for slot in slots:
            self.slot(slot)[rows] = source.slot(slot)[rows]


def every_output(shape: ModelShape) -> Memory:
    """Memory of plans that keep what each site puts out."""
    return Memory(live=tuple(map(Slot.of, range(len(shape.sites)))))
