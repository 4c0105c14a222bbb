"""What a model is made of right now, so that a graph or a table made from it can tell whether it still holds."""

from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from torch import Tensor, nn


class Fingerprint(NamedTuple):
    """Two models of equal parts lie at the same addresses; of equal versions, nothing wrote there since.

    A write through ``.data`` changes neither. So whatever is computed from weights is computed anew for each
    trajectory, and graphs read the weights themselves.
    """

    parts: bytes
    versions: bytes
    watched: bool  # hooks, or a forward of its own, on some part of the model: Python that a graph would not run


def fingerprint(model: nn.Module) -> Fingerprint:
    """The modules, their hooks and the memory of their parameters and buffers.

    The drop-in asks for it at every call, so it is made of whole columns: loops that Python does not interpret.
    """
    modules, found = [model], [model]
    while found:
        inner = map(itemgetter("_modules"), map(vars, found))
        found = [child for child in chain.from_iterable(map(dict.values, inner)) if child is not None]
        modules += found
    own = list(map(vars, modules))
    tensors = _values(own, "_parameters") + _values(own, "_buffers")
    below = own[1:]  # the model's own hooks run around a graph, and its own forward may be the one that asks
    hooks = [len(one["_forward_hooks"]) for one in below]
    pre_hooks = [len(one["_forward_pre_hooks"]) for one in below]
    forwards = ["forward" in one for one in below]
    dtypes = map(attrgetter("dtype"), tensors)
    columns = map(id, modules), hooks, pre_hooks, forwards, map(id, tensors), map(Tensor.data_ptr, tensors)
    strides = chain.from_iterable(map(Tensor.stride, tensors))
    return Fingerprint(
        array("Q", chain(*columns, map(id, dtypes), strides)).tobytes(),
        array("Q", _versions(tensors)).tobytes(),
        any(hooks) or any(pre_hooks) or any(forwards),
    )


def _values(own: Sequence[dict[str, Any]], name: str) -> list[Tensor]:
    values = chain.from_iterable(map(dict.values, map(itemgetter(name), own)))
    return [tensor for tensor in values if tensor is not None]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    if any(map(Tensor.is_inference, tensors)):  # inference tensors have none
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    return list(map(attrgetter("_version"), tensors))
