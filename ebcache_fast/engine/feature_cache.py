"""Where branch outputs live between steps: one tensor of slots, addressed by layer and branch."""

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from ebcache_fast.plan import Branch, ModelShape, Slot


class FeatureCache:
    """Ungated branch outputs of a whole batch, guidance rows included, at fixed addresses.

    Each slot in ``live`` has memory of its own, in the order of execution; all others share one slot of
    scratch, because a branch must write somewhere even if no step ever reads it. A slot is (N, T, D).
    """

    def __init__(
        self, shape: ModelShape, live: Iterable[Slot], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        wanted = frozenset(live)
        every = _every_slot(shape)
        kept = [slot for slot in every if slot in wanted]
        scratch = len(kept)
        count = _memories(shape, wanted)
        self._index: dict[Slot, int] = dict.fromkeys(every, scratch) | {s: i for i, s in enumerate(kept)}
        self._slots = torch.empty(count, rows, shape.tokens, shape.width, dtype=dtype, device=device)

    @classmethod
    def full(cls, shape: ModelShape, rows: int, dtype: torch.dtype, device: torch.device) -> "FeatureCache":
        """A cache in which every slot is live."""
        return cls(shape, _every_slot(shape), rows, dtype, device)

    @staticmethod
    def bytes_for(shape: ModelShape, live: Iterable[Slot], rows: int, dtype: torch.dtype) -> int:
        """Bytes that such a cache allocates."""
        return _memories(shape, frozenset(live)) * rows * shape.slot_elements * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._slots.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it consists of."""
        return (self._slots,)

    def slot(self, layer: int, branch: Branch) -> Tensor:
        """The memory of one slot, (N, T, D)."""
        return self._slots[self._index[layer, branch]]

    def every_slot(self) -> Tensor:
        """All slots in the order of execution, (K, N, T, D), where every one of them is live."""
        return self._slots

    def copy_rows(self, source: "FeatureCache", slots: Iterable[Slot], rows: Tensor) -> None:
        """Take over ``slots`` from ``source`` for the batch rows where ``rows`` (N,) bool is true."""
        for slot in slots:
            self.slot(*slot)[rows] = source.slot(*slot)[rows]


def _every_slot(shape: ModelShape) -> list[Slot]:
    return list(product(range(shape.depth), (cost.branch for cost in shape.branches)))


def _memories(shape: ModelShape, live: frozenset[Slot]) -> int:
    """How many slots have memory: those that are live, and one for all others."""
    every = _every_slot(shape)
    kept = sum(slot in live for slot in every)
    return kept + (kept < len(every))
