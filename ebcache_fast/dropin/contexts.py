"""Which of the prompts that were seen lately a call has: runs of different ones are different runs."""

from collections import OrderedDict
from itertools import count

import torch
from torch import Tensor

from ebcache_fast.models import Context


class _Seen:
    """One context, as it was when it was first seen."""

    def __init__(self, context: Context, makes: int) -> None:
        self._given, self._versions, self.makes = context, _versions(context), makes
        self._kept = tuple(None if one is None else one.detach().clone() for one in context)

    def is_same(self, context: Context) -> bool:
        """Whether these are the very tensors, unchanged: where torch counts, that costs no look at what they hold."""
        versions = _versions(context)  # as many as there are tensors
        if versions != self._versions or not all(map(_is, context, self._given)):
            return False
        return None not in versions or self.is_equal(context)

    def is_equal(self, context: Context) -> bool:
        """Whether they hold the same; that may wait for the device."""
        return len(context) == len(self._kept) and all(map(_equal, context, self._kept))


class Contexts:
    """Numbers for contexts, the same for equal ones; of as many as ``limit``, those used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: OrderedDict[int, _Seen] = OrderedDict()
        self._numbers = count(1)

    def number_of(self, context: Context) -> int:
        """The number of this context, a new one for one that is not known; 0 where there is none."""
        if not context:
            return 0
        known = reversed(self._seen.items())
        found = next((number for number, seen in known if seen.is_same(context)), None)
        if found is None:
            known = reversed(self._seen.items())
            found = next((number for number, seen in known if seen.is_equal(context)), next(self._numbers))
            self._seen[found] = _Seen(context, self.makes_of(found) + 1)
        self._seen.move_to_end(found)
        while len(self._seen) > self._limit:
            self._seen.popitem(last=False)
        return found

    def makes_of(self, number: int) -> int:
        """How often the context of this number came in other tensors than before; 0 where it is not known."""
        return self._seen[number].makes if number in self._seen else 0


def _is(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether they are one tensor, or views of one place in memory that is still in use."""
    if one is None or other is None:
        return one is other
    places = ((each.data_ptr(), each.shape, each.stride(), each.dtype, each.device) for each in (one, other))
    return one is other or next(places) == next(places)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device) and torch.equal(one, other)


def _versions(context: Context) -> list[int | None]:
    """How often each was written to; None where torch does not count."""
    return [-1 if one is None else None if one.is_inference() else one._version for one in context]
