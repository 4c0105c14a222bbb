"""What a model is made of right now, so that a graph or a table made from it can tell whether it still holds."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from ebcache_fast.models.layers import has_another_forward

Columns = tuple[list[Any], ...]
INSIDE = list(map(itemgetter, ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")))


class Fingerprint(NamedTuple):
    """Two models of equal parts lie at the same addresses; of equal versions, nothing wrote there since.

    Adapters of peft that were scaled, or turned on and off, count as written to.

    A write through ``.data`` changes neither. So whatever is computed from weights is computed anew for each
    trajectory, and graphs read the weights themselves.
    """

    parts: Columns
    versions: list[Any]
    watched: bool  # hooks, or a forward of its own, on some part of the model: Python that a graph would not run


class Watch:
    """Looks at one model time and again: its modules, their hooks and the memory of their parameters and buffers.

    The drop-in looks at every call, so it is done by whole columns, in loops that Python does not interpret, and the
    tree of modules is walked only when one of them has others below it than it had. Those seen last are kept, so that
    no other module can come to lie where one of them did.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []  # until the first look: a model that is copied has nothing yet
        self._insides: list[dict[str, Any]] = []
        self._seen: Fingerprint | None = None

    def look(self) -> Fingerprint:
        """What it is made of now; the very object of the last look where that is the same."""
        if _look_at(self._modules, self._insides) != self._seen:
            self._modules = _walk(self._model)
            self._insides = list(map(vars, self._modules))
            self._seen = _look_at(self._modules, self._insides)
        return self._seen


def _walk(model: nn.Module) -> list[nn.Module]:
    """The model and all below it; a module that has two places comes twice."""
    modules, found = [model], [model]
    while found:
        found = [child for child in _values(vars(one)["_modules"] for one in found) if child is not None]
        modules += found
    return modules


def _look_at(modules: Sequence[nn.Module], insides: Sequence[dict[str, Any]]) -> Fingerprint:
    """The fingerprint of modules and their attributes, the whole model's first."""
    children, parameters, buffers, hooks, pre_hooks = (list(map(get, insides)) for get in INSIDE)
    tensors = [one for one in chain(_values(parameters), _values(buffers)) if one is not None]
    # The model's own hooks run around a graph, and its own forward may be the one that asks.
    forwards = list(map(dict.get, insides[1:], repeat("forward")))
    python = list(map(len, hooks[1:])), list(map(len, pre_hooks[1:]))
    others = forwards.count(None) < len(forwards) and any(map(has_another_forward, modules[1:]))
    strides = chain.from_iterable(map(Tensor.stride, tensors))
    memory = map(Tensor.data_ptr, tensors), strides, map(attrgetter("dtype"), tensors)
    processors = map(dict.get, insides, repeat("processor"))  # what attention of diffusers lets compute in its place
    kinds = map(type, modules), processors
    columns = *kinds, map(id, _values(children)), *python, forwards, map(id, tensors), *memory
    parts = tuple(list[Any](column) for column in columns)
    versions = [*_versions(tensors), *_adapters(insides)]
    return Fingerprint(parts, versions, others or any(chain(*python)))


def _values(dicts: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, filter(None, dicts)))  # most are empty


def _adapters(insides: Sequence[dict[str, Any]]) -> list[Any]:
    """Whether and how much each of peft's adapters counts, which are plain numbers beside its weights."""
    switches = list(map(dict.get, insides, repeat("_disable_adapters")))
    if switches.count(None) == len(switches):  # as most models are: no look at each
        return []
    layers = [inside for inside, switch in zip(insides, switches, strict=True) if switch is not None]
    return [(one["_disable_adapters"], str(one.get("_active_adapter")), str(one.get("scaling"))) for one in layers]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # inference tensors have none
        return [tensor._version for tensor in tensors if not tensor.is_inference()]
