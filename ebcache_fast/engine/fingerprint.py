"""What a model is made of right now, so that a graph or a table made from it can tell whether it still holds."""

from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn


class Fingerprint(NamedTuple):
    """Two models of equal parts lie at the same addresses; of equal versions, nothing wrote there since.

    A write through ``.data`` changes neither. So whatever is computed from weights is computed anew for each
    trajectory, and graphs read the weights themselves.
    """

    parts: tuple[object, ...]
    versions: tuple[int, ...]
    watched: bool  # hooks, or a forward of its own, on some part of the model: Python that a graph would not run


def fingerprint(model: nn.Module) -> Fingerprint:
    """The modules, their hooks and the memory of their parameters and buffers."""
    parts: list[object] = []
    versions: list[int] = []
    watched = False
    waiting = [model]
    while waiting:
        module = waiting.pop()
        own = vars(module)
        if module is not model:
            watchers = len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]), "forward" in own
            parts.append((id(module), *watchers))
            watched = watched or any(watchers)
        for tensor in chain(own["_parameters"].values(), own["_buffers"].values()):
            if tensor is not None:
                parts.append((id(tensor), tensor.data_ptr(), tensor.dtype))
                versions.append(_version(tensor))
        waiting.extend(child for child in own["_modules"].values() if child is not None)
    return Fingerprint(tuple(parts), tuple(versions), watched)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors have none
