"""State of a model's modules and weights, so that a graph or a table made from it can tell whether it still holds."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, repeat, takewhile
from operator import attrgetter, call, itemgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebcache_fast.models.layers import PLAIN_TENSORS, has_another_forward, walk

Columns = tuple[list[Any], ...]
INSIDE = list(map(itemgetter, ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")))
BASES = (nn.Module, object)  # what is above a layer's own classes
FUNCTIONS = (FunctionType, BuiltinFunctionType)
PLAIN = (bool, int, float, str, tuple, type(None))  # what a graph would keep of an attribute


class ModuleState(NamedTuple):
    """State of a model. Two of equal parts lie at the same addresses; of equal versions, nothing wrote there since.

    Parts are also the plain numbers among the attributes of layers (an epsilon, heads, a factor), their classes'
    methods, and the functions that these call by a global name. Adapters of peft that were scaled, or turned on and
    off, count as written to. Tensors of a class of their own, as quantised weights are, need have no address: they are
    told apart by identity and version.

    A write through ``.data`` changes neither. So whatever is computed from weights is computed anew for each
    trajectory, and graphs read the weights themselves.
    """

    parts: Columns
    versions: list[Any]
    watched: bool  # hooks, or a forward of its own, on some part of the model: Python that a graph would not run

    @property
    def code(self) -> Columns:
        """The Python that its layers and weights run, and with which numbers, but for hooks: the first of its parts."""
        return self.parts[:6]


class Watch:
    """Looks at one model time and again: its modules, their hooks and the memory of their parameters and buffers.

    The drop-in looks at every call, so it is done by whole columns, in loops that Python does not interpret, and the
    modules are walked only when one of them has others below it than it had. Those seen last are kept, so that no other
    module can come to lie where one of them did.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tree: _Tree | None = None  # until the first look: a model that is copied has nothing yet
        self._seen: ModuleState | None = None

    def look(self) -> ModuleState:
        """The state of the model now; the very object of the last look where nothing changed."""
        if self._tree is None or _look_at(self._tree) != self._seen:
            self._tree = _Tree.of(self._model)
            self._seen = _look_at(self._tree)
        return self._seen  # type: ignore[return-value]  # of the branch before, or of an earlier one


class _Tree(NamedTuple):
    """A model's modules, itself first, and where to find what else they are made of."""

    modules: Sequence[nn.Module]
    insides: Sequence[dict[str, Any]]
    getters: Sequence[Callable[[Any], Any]]  # of the numbers in each of
    numbered: Sequence[dict[str, Any]]
    functions: Sequence[Callable[[], Any]]  # what finds those of each class, and of its file

    @classmethod
    def of(cls, model: nn.Module) -> "_Tree":
        modules = [module for _, module in walk(model)]
        insides = list(map(vars, modules))
        processors = [processor for processor in map(dict.get, insides, repeat("processor")) if processor is not None]
        # A linear layer's sizes are its weight's. Names with a _ are bookkeeping, but those of processors.
        found = [(_plain_in(vars(part), hidden=False), vars(part)) for part in modules if type(part) is not nn.Linear]
        found += [(_plain_in(vars(part), hidden=True), vars(part)) for part in processors if hasattr(part, "__dict__")]
        getters = [itemgetter(*names) for names, _ in found if names]
        functions = _functions_of(dict.fromkeys(map(type, [*modules, *processors])))
        return cls(modules, insides, getters, [inside for names, inside in found if names], functions)


def _functions_of(kinds: Iterable[type]) -> list[Callable[[], Any]]:
    """Getters of the methods of classes, and of the functions that these call by a global name."""
    found: list[Callable[[], Any]] = []
    called: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}  # of each file's globals, the names
    for kind in kinds:
        bases = takewhile(lambda base: base not in BASES, kind.__mro__)
        own = [(name, getattr(member, "__func__", member)) for base in bases for name, member in vars(base).items()]
        methods = [(name, member) for name, member in own if isinstance(member, FunctionType)]
        usual = ("__call__", "forward") if issubclass(kind, nn.Module) else ("__call__",)
        found.append(partial(attrgetter(*dict.fromkeys((*usual, *(name for name, _ in methods)))), kind))
        for _, method in methods:
            inside, names = called.setdefault(id(method.__globals__), (method.__globals__, {}))
            of_file = (name for name in method.__code__.co_names if isinstance(inside.get(name), FUNCTIONS))
            names.update(dict.fromkeys(of_file))
    return found + [partial(itemgetter(*names), inside) for inside, names in called.values() if names]


def _plain_in(inside: dict[str, Any], *, hidden: bool) -> list[str]:
    """The names of attributes that are numbers, flags, names or tuples of them, but for the mode of training."""
    names = (name for name, value in inside.items() if isinstance(value, PLAIN) and name != "training")
    return [name for name in names if hidden or name[0] != "_"]


def _look_at(tree: _Tree) -> ModuleState | None:
    """The state of modules and their attributes, the whole model's first; None where one has fewer by now."""
    insides = tree.insides
    children, parameters, buffers, hooks, pre_hooks = (list(map(get, insides)) for get in INSIDE)
    filled = filter(None, chain(parameters, buffers))  # most modules have none of their own
    tensors = [tensor for tensor in chain.from_iterable(map(dict.values, filled)) if tensor is not None]
    below = chain.from_iterable(map(dict.values, filter(None, children)))
    # The model's own hooks run around a graph, and its own forward may be the one that asks.
    forwards = list(map(dict.get, insides[1:], repeat("forward")))
    have_hooks = any(hooks[1:]), any(pre_hooks[1:])
    python = [
        list(map(len, registered[1:])) if some else ()
        for some, registered in zip(have_hooks, (hooks, pre_hooks), strict=True)
    ]
    others = forwards.count(None) < len(forwards) and any(map(has_another_forward, tree.modules[1:]))
    classes = list(map(type, tensors))
    plain = (
        tensors
        if PLAIN_TENSORS.issuperset(classes)
        else [tensor for tensor in tensors if type(tensor) in PLAIN_TENSORS]
    )
    strides = map(Tensor.stride, plain)
    memory = map(Tensor.data_ptr, plain), strides, map(attrgetter("dtype"), plain)
    processors = map(dict.get, insides, repeat("processor"))  # what attention of diffusers lets compute in its place
    modes = list(map(dict.get, tree.numbered, repeat("training")))  # of no matter where all are in the same
    try:
        numbers, functions = list(map(call, tree.getters, tree.numbered)), list(map(call, tree.functions))
    except (KeyError, AttributeError):
        return None
    kinds = map(type, tree.modules), processors, functions, modes if len({*modes}) > 1 else ()
    columns = numbers, *kinds, classes, map(id, below), *python, forwards, map(id, tensors), *memory
    parts = tuple(list[Any](column) for column in columns)
    switches = list(map(dict.get, insides, repeat("_disable_adapters")))
    adapters = [] if switches.count(None) == len(switches) else _adapters(insides)  # most models have none
    with torch._C.DisableTorchFunctionSubclass():  # a class may refuse to be asked
        try:
            versions = list(map(attrgetter("_version"), tensors))
        except RuntimeError:  # inference tensors have none
            versions = [tensor._version for tensor in tensors if not tensor.is_inference()]
    return ModuleState(parts, [*versions, *adapters], others or any(have_hooks))


def _adapters(insides: Sequence[dict[str, Any]]) -> list[Any]:
    """States of peft's adapters, on or off and how strong, which are plain numbers beside its weights."""
    layers = [inside for inside in insides if inside.get("_disable_adapters") is not None]
    return [
        (layer["_disable_adapters"], str(layer.get("_active_adapter")), str(layer.get("scaling"))) for layer in layers
    ]
