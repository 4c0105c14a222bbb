"""CUDA graphs on the CPU: a replay works on the addresses of its capture, and whatever a GPU could not do is refused.

A capture runs its body for real, because torch can't record without, and puts back every static bit afterwards. What
it keeps of a tensor is its memory (storage, offset, size, stride, dtype), never the tensor: a parameter given other
memory later is not followed, as a baked address would not be. Memory made inside a capture is poison outside of its
graph's replays.

Not seen: `.to()` and constructors with the device of another tensor, since all devices are alike here, reads through
a storage, streams, and what libraries keep for themselves, such as cuBLAS's workspaces. Stricter than CUDA: numbers
assigned to elements, and `x[mask] = number`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as dispatch

from ebcache_fast.errors import CaptureError
from ebcache_fast.ops.operations import Operations

HOST_READS = frozenset({Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__repr__})
CONSTRUCTORS = frozenset({torch.arange, torch.empty, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros})
SYNCHRONISES = "makes the host wait for the device"


class Node(NamedTuple):
    """One recorded operation, bound to the memory that it was recorded on."""

    name: str
    run: Callable[[], None]


class FakeGraph:
    """What a capture recorded: the names of its ``nodes`` in order, and ``nbytes`` of memory made inside of it."""

    def __init__(self, nodes: Sequence[Node], temporaries: Sequence[Tensor], graphs: "FakeGraphs") -> None:
        self.nodes = tuple(node.name for node in nodes)
        self.nbytes = sum(memory.nbytes for memory in temporaries)
        self._nodes, self._graphs = nodes, graphs
        self._temporaries = [(memory, poison_of(memory.dtype)) for memory in temporaries]
        self._poison()

    def replay(self) -> None:
        """Run the nodes on their memory, unseen by any mode. Raises CaptureError while a capture is on."""
        if recorder := current_recorder():
            recorder.refuse("a replay", "is no operation")
        with unobserved():
            self._poison()
            try:
                for node in self._nodes:
                    self._graphs.count_replayed()
                    node.run()
            finally:
                self._poison()
        self._graphs.replays += 1

    def _poison(self) -> None:
        for memory, poison in self._temporaries:
            memory.fill_(poison)


@dataclass(eq=False)
class FakeGraphs:
    """Captures graphs, counts what happens, and fails on request.

    ``fail_at`` and ``fail_replay_at``: which node, counted from 0 over the whole lifetime as ``recorded`` and
    ``replayed`` are, raises ``failure()`` instead of being recorded, or run. Nodes are operations, whole ones too, but
    neither views nor bare allocations.
    """

    fail_at: int | None = None
    fail_replay_at: int | None = None
    failure: Callable[[], BaseException] = torch.OutOfMemoryError
    captures: int = 0  # that succeeded
    replays: int = 0  # that came to their end
    recorded: int = 0  # nodes, those of failed captures included
    replayed: int = 0  # nodes
    alive: WeakSet[FakeGraph] = field(default_factory=WeakSet)  # graphs that somebody holds

    def capture(self, body: Callable[[], None], static: Sequence[Tensor]) -> FakeGraph:
        """Record ``body``, none of which takes effect, also when it raises.

        ``static``: every tensor from outside that it reads or writes. Raises CaptureError, even if the body swallows
        it, for other tensors, constants from the host, copies between devices, random numbers and synchronisations.
        """
        if outer := current_recorder():
            outer.refuse("a capture inside a capture", "is no operation")
        with unobserved():
            memories = {identity(tensor): flat(tensor, torch.uint8) for tensor in static}
            saved = {key: memory.clone() for key, memory in memories.items()}
        recorder = Recorder(memories, self)
        try:
            with recorder, HostReads(recorder.refuse):
                body()
        finally:
            with unobserved():
                for key, bits in saved.items():
                    memories[key].copy_(bits)
        if recorder.refusal:
            raise CaptureError(recorder.refusal)
        with unobserved():
            graph = FakeGraph(recorder.nodes, [flat(made, made.dtype) for made in recorder.made.values()], self)
        self.captures += 1
        self.alive.add(graph)
        return graph

    def wrap(self, operations: Operations) -> Operations:
        """The same operations, each of which a capture records as one node, whatever it does inside."""

        def whole(name: str, operation: Callable[..., None]) -> Callable[..., None]:
            def run(*args: Any, **kwargs: Any) -> None:
                recorder = current_recorder()
                (partial(recorder.record_whole, name, operation) if recorder else operation)(*args, **kwargs)

            return run

        found = {name: value for name, value in vars(operations).items() if callable(value)}
        wrapped: dict[str, Any] = {name: whole(name, operation) for name, operation in found.items()}
        return replace(operations, **wrapped)

    @contextmanager
    def quiet(self) -> Iterator[list[str]]:
        """A list that gets the names of all operations that this thread runs outside of replays, while inside."""
        heard: list[str] = []
        with Listener(heard), HostReads(lambda name, _: heard.append(name)):
            yield heard

    def count_recorded(self) -> None:
        """Count one more node, or fail."""
        self.recorded += 1
        if self.recorded - 1 == self.fail_at:
            raise self.failure()

    def count_replayed(self) -> None:
        """Count one more node that is about to run, or fail."""
        self.replayed += 1
        if self.replayed - 1 == self.fail_replay_at:
            raise self.failure()


class Recorder(dispatch.TorchDispatchMode):
    """Records what is dispatched while it is on. It holds all memory by identity, so that none is used twice."""

    def __init__(self, static: dict[int, Tensor], graphs: FakeGraphs) -> None:
        super().__init__()
        self._static, self._graphs = static, graphs
        self.made: dict[int, Tensor] = {}
        self.nodes: list[Node] = []
        self.refusal: str | None = None

    def refuse(self, name: str, why: str) -> NoReturn:
        """End this capture, whatever the body makes of the error."""
        self.refusal = f"{name} {why}, which no graph can hold; do it before the capture"
        raise CaptureError(self.refusal)

    def record_whole(self, name: str, operation: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Record and run ``operation`` as one node, under the autocast of now."""
        dtype, enabled = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        with unobserved():
            self._check(name, tensors_of((args, kwargs)))
            bare_args, bare_kwargs = with_bare((args, kwargs))

            def run() -> None:
                with torch.autocast("cpu", dtype, enabled, cache_enabled=False):
                    operation(*bare_args, **bare_kwargs)

            self._add(Node(name, run))
            run()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # under inference_mode compound operations arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = tensors_of((args, kwargs))
        if why := why_not(func, args, kwargs, tensors):
            self.refuse(str(func), why)
        self._check(str(func), tensors)
        result = func(*args, **kwargs)
        targets = [None if self._knows(output) else bare(output) for output in tensors_of(result)]
        made = {identity(target): target for target in targets if target is not None}
        self.made |= made
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        allocates = func._schema.name.startswith(("aten::empty", "aten::new_empty"))
        if allocates:  # what lies there by chance must not end a capture as an index
            for memory in made.values():
                memory.zero_()
        elif writes or made:
            bare_args, bare_kwargs = with_bare((args, kwargs))

            def run() -> None:
                for target, value in zip(targets, tensors_of(func(*bare_args, **bare_kwargs)), strict=True):
                    if target is not None:
                        target.copy_(value)

            self._add(Node(str(func), run))
        return result

    def _add(self, node: Node) -> None:
        self._graphs.count_recorded()
        self.nodes.append(node)

    def _knows(self, tensor: Tensor) -> bool:
        return identity(tensor) in self._static or identity(tensor) in self.made

    def _check(self, name: str, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if not self._knows(tensor):
                kind = f"{tuple(tensor.shape)} {tensor.dtype}"
                self.refuse(name, f"uses memory ({kind}) that is neither static nor made in this capture")


class HostReads(TorchFunctionMode):
    """Reports calls that on a GPU read its memory from the host, or make a tensor there, and here dispatch nothing."""

    def __init__(self, report: Callable[[str, str], object]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = func is Tensor.to and any(isinstance(value, str) for value in (*args, *kwargs.values()))
        if moves or func in HOST_READS:
            self._report(f"torch.Tensor.{func.__name__}", SYNCHRONISES)
        if func in CONSTRUCTORS and kwargs.get("device") is None:
            self._report(f"torch.{func.__name__}", "makes a tensor on the host unless told a device")
        return func(*args, **kwargs)


class Listener(dispatch.TorchDispatchMode):
    """Writes down the name of every operation."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__()
        self._heard = heard

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._heard.append(str(func))
        return func(*args, **(kwargs or {}))


def why_not(func: OpOverload, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> str | None:
    """Why no graph can hold this call with these ``tensors``, in a few words; None where it can."""
    tags = func.tags
    defaults = defaults_of(func)
    named = defaults | dict(zip(defaults, args, strict=False)) | kwargs
    indices = tensors_of(named.get("indices"))
    masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    sized_by_data = torch.Tag.dynamic_output_shape in tags and not indices
    if masked or sized_by_data or torch.Tag.data_dependent_output in tags:
        return SYNCHRONISES
    if torch.Tag.nondeterministic_seeded in tags and named.get("dropout_p") != 0:
        return "draws random numbers"
    if func is torch.ops.aten.lift_fresh.default:
        return "copies a constant from the host"
    devices = {tensor.device for tensor in tensors} | {named.get("device")} - {None}
    return "copies between devices" if len(devices) > 1 else None


@cache
def defaults_of(func: OpOverload) -> dict[str, Any]:
    """An operation's arguments, by name."""
    return {argument.name: argument.default_value for argument in func._schema.arguments}


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts; torch's own trees take most of a capture's time."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for one in tree for tensor in tensors_of(one)]


def with_bare(tree: Any) -> Any:
    """The same tree with every tensor `bare`."""
    if isinstance(tree, Tensor):
        return bare(tree)
    if isinstance(tree, dict):
        return {name: with_bare(one) for name, one in tree.items()}
    if not tensors_of(tree):
        return tree
    inner = map(with_bare, tree)
    return type(tree)(*inner) if hasattr(tree, "_fields") else type(tree)(inner)


def identity(tensor: Tensor) -> int:
    """What two tensors share exactly where they share a storage."""
    address: int = tensor.untyped_storage()._cdata
    return address


def bare(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, with nothing else in common."""
    alias = torch.zeros(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """All of a tensor's storage, (elements,)."""
    return torch.zeros(0, dtype=dtype, device=tensor.device).set_(tensor.untyped_storage())


def poison_of(dtype: torch.dtype) -> float:
    """NaN, an index beyond every tensor, or True."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def current_recorder() -> Recorder | None:
    """The capture that is on in this thread."""
    return next((mode for mode in dispatch._get_current_dispatch_mode_stack() if isinstance(mode, Recorder)), None)


@contextmanager
def unobserved() -> Iterator[None]:
    """No mode sees what runs inside, and neither autograd nor autocast has a part in it."""
    no_modes, no_functions = dispatch._disable_current_modes(), torch._C.DisableTorchFunction()
    with no_modes, no_functions, torch.inference_mode(), torch.autocast("cpu", enabled=False):
        yield
