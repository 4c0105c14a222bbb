"""Ids of the prompts that were seen lately: runs of different ones are different runs."""

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ebcache_fast.dropin.runs import location_of, reference_to
from ebcache_fast.models import Conditioning


class _Tensors(NamedTuple):
    """The tensors that a prompt came in, and how often each had been written to; None where torch does not count."""

    locations: tuple[Hashable, ...]
    references: tuple[StorageWeakRef, ...]
    versions: tuple[int | None, ...]

    @property
    def are_alive(self) -> bool:
        return not any(reference.expired() for reference in self.references)  # type: ignore[no-untyped-call]


class _Seen:
    """Prompt seen before: what it held, and the tensors that held it."""

    def __init__(self, context: Conditioning) -> None:
        self._copies = tuple(None if tensor is None else tensor.detach().clone() for tensor in context)
        self._tensors: list[_Tensors] = []

    def is_same(self, context: Conditioning) -> bool:
        """True if these are tensors seen before, unchanged; where torch counts, without a look at what they hold."""
        versions, locations = _versions(context), _locations(context)
        if any(seen.versions == versions and seen.locations == locations for seen in self._tensors):
            return None not in versions or self.is_equal(context)
        return False

    def is_equal(self, context: Conditioning) -> bool:
        """True if these tensors hold the same as the prompt's; that may wait for the device."""
        return len(context) == len(self._copies) and all(map(_equal, context, self._copies))

    def note(self, context: Conditioning) -> None:
        """Know the prompt again by these tensors, for as long as they live."""
        references = tuple(reference_to(tensor) for tensor in context if tensor is not None)
        alive = [seen for seen in self._tensors if seen.are_alive]
        self._tensors = [*alive, _Tensors(_locations(context), references, _versions(context))]


class PromptIds:
    """Numbers for prompts, the same for equal ones; of as many as ``limit``, those used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: OrderedDict[int, _Seen] = OrderedDict()
        self._ids = count(1)

    def id_of(self, context: Conditioning, in_use: Callable[[], Container[Hashable]] = tuple) -> int:
        """The id of this prompt, a new one for one that is not known; 0 where there is none.

        Those ``in_use`` are not forgotten.
        """
        if not context:
            return 0
        known = reversed(self._seen.items())
        found = next((number for number, seen in known if seen.is_same(context)), None)
        if found is None:
            known = reversed(self._seen.items())
            found = next((number for number, seen in known if seen.is_equal(context)), None)
            if found is None:
                found = next(self._ids)
                self._seen[found] = _Seen(context)
            self._seen[found].note(context)
        self._seen.move_to_end(found)
        if len(self._seen) > self._limit:
            kept = in_use()
            spare = [number for number in self._seen if number != found and number not in kept]
            for number in spare[: len(self._seen) - self._limit]:
                del self._seen[number]
        return found


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device) and torch.equal(
        left, right
    )


def _locations(context: Conditioning) -> tuple[Hashable, ...]:
    return tuple(None if tensor is None else location_of(tensor) for tensor in context)


def _versions(context: Conditioning) -> tuple[int | None, ...]:
    return tuple(-1 if tensor is None else None if tensor.is_inference() else tensor._version for tensor in context)
