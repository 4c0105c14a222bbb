"""Which of the prompts that were seen lately a call has: runs of different ones are different runs."""

from collections import OrderedDict
from collections.abc import Container, Hashable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ebcache_fast.dropin.given import Given, place_of
from ebcache_fast.models import Context


class _Tensors(NamedTuple):
    """The tensors that a context came in, and how often each had been written to; None where torch does not count."""

    given: tuple[Given | None, ...]
    versions: tuple[int | None, ...]

    @property
    def is_alive(self) -> bool:
        return all(one is None or one.is_alive for one in self.given)


class _Seen:
    """One context: what it held, and the tensors that held it."""

    def __init__(self, context: Context) -> None:
        self._copies = tuple(None if one is None else one.detach().clone() for one in context)
        self._tensors: list[_Tensors] = []

    def is_same(self, context: Context) -> bool:
        """Whether these are tensors seen before, unchanged; where torch counts, without a look at what they hold."""
        versions = _versions(context)
        places = tuple(None if one is None else place_of(one) for one in context)
        for given, then in self._tensors:
            if then == versions and places == tuple(one and one.place for one in given):
                return None not in versions or self.is_equal(context)
        return False

    def is_equal(self, context: Context) -> bool:
        """Whether they hold the same; that may wait for the device."""
        return len(context) == len(self._copies) and all(map(_equal, context, self._copies))

    def note(self, context: Context) -> None:
        """Know it again by these tensors, for as long as they live."""
        given = tuple(None if one is None else Given(one) for one in context)
        self._tensors = [one for one in self._tensors if one.is_alive] + [_Tensors(given, _versions(context))]


class Contexts:
    """Numbers for contexts, the same for equal ones; of as many as ``limit``, those used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: OrderedDict[int, _Seen] = OrderedDict()
        self._numbers = count(1)

    def number_of(self, context: Context, in_use: Container[Hashable] = ()) -> int:
        """The number of this context, a new one for one that is not known; 0 where there is none.

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
                found = next(self._numbers)
                self._seen[found] = _Seen(context)
            self._seen[found].note(context)
        self._seen.move_to_end(found)
        spare = [number for number in self._seen if number != found and number not in in_use]
        for number in spare[: max(0, len(self._seen) - self._limit)]:
            del self._seen[number]
        return found


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device) and torch.equal(one, other)


def _versions(context: Context) -> tuple[int | None, ...]:
    return tuple(-1 if one is None else None if one.is_inference() else one._version for one in context)
