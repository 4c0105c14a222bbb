"""A fused operation as its tests see it, and the measure by which a call of it is judged.

Kernel and reference have one signature, so that a call is its operands by name. Of these some are written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from accuracy import DEVICE, Guarded, amid_nan, assert_accurate, draw, in_float64
from torch import Tensor

from ebcache_fast.ops.operands import Advance, StepIndex

Call = dict[str, Any]  # operands by name
Change = Callable[[Call], Call]


class Form(NamedTuple):
    """A call of another form than a drawn one: it has these values of the axes, and is changed."""

    values: tuple[Any, ...]
    change: Change
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Operation:
    """A kernel, its reference, and what calls of them are made of."""

    kernel: Callable[..., None]
    reference: Callable[..., None]
    make: Callable[..., Call]  # of a value of each axis, and a dtype; what is only written is NaN
    axes: tuple[Iterable[Any] | Mapping[str, Any], ...]
    plain: tuple[Any, ...]  # a value of each axis
    written: tuple[str, ...]  # paths, as "h" or "update.previous"
    forms: Mapping[str, Form] = field(default_factory=dict)
    moves_bits: bool = False  # and computes nothing

    def __str__(self) -> str:
        """The kernel's file and name: `bench.mutants` chooses a file's tests by it."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    def call(self, dtype: torch.dtype = torch.float32) -> Call:
        """A plain one."""
        return self.make(*self.plain, dtype)

    def expected(self, call: Call) -> dict[str, Tensor]:
        """What the reference writes, by path; the call stays as it was."""
        call = mapped(lambda _, tensor: tensor.clone(), call)
        self.reference(**call)
        return {path: tensor for path, tensor in tensors(call) if path in self.written}


def check(operation: Operation, call: Call, dtype: torch.dtype) -> None:
    """Hold a call of the kernel against the reference, in its own dtype and in float64.

    What is written lies between guards, and what is read between NaN: nothing beside either may count or change.
    """
    guards: dict[str, Guarded] = {}

    def place(path: str, tensor: Tensor) -> Tensor:
        if path in operation.written:
            guards[path] = Guarded(tensor.shape, tensor.dtype, tensor)
            return guards[path].tensor
        return amid_nan(tensor) if tensor.is_floating_point() else tensor

    placed = mapped(place, call)
    operation.kernel(**placed)
    own, exact = operation.expected(call), operation.expected(in_float64(call))
    for path, guarded in guards.items():
        if operation.moves_bits:
            assert torch.equal(guarded.written(), own[path]), path
        else:
            assert_accurate(guarded.written().to(dtype), own[path].to(dtype), exact[path])
    for (path, before), (_, after) in zip(tensors(call), tensors(placed), strict=True):
        assert path in guards or torch.equal(before, after), f"{path} was written"


def mapped(change: Callable[[str, Tensor], Tensor], value: Any, path: str = "") -> Any:
    """The same dictionaries, named tuples and sequences with every tensor changed."""
    if isinstance(value, Tensor):
        return change(path, value)
    inner = partial(mapped, change)
    below = f"{path}." if path else ""
    if isinstance(value, dict):
        return {name: inner(one, f"{below}{name}") for name, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(inner(one, f"{below}{name}") for name, one in zip(value._fields, value, strict=True)))
    if isinstance(value, list | tuple):
        return type(value)(inner(one, f"{below}{place}") for place, one in enumerate(value))
    return value


def tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in one, with its path."""
    found: list[tuple[str, Tensor]] = []
    mapped(lambda path, tensor: found.append((path, tensor)) or tensor, value)  # type: ignore[func-returns-value]
    return iter(found)


# ------------------------------------------------------------------------------------------- forms of many operations


def with_norm(**changes: Any) -> Change:
    """Another norm: an epsilon, or "weight" and "bias" as seeds of numbers to draw."""

    def change(call: Call) -> Call:
        norm = call["norm"]
        width, dtype = norm.shift.shape[-1], norm.shift.dtype
        drawn = {
            name: value if name == "eps" else draw(width, dtype=dtype, seed=value) for name, value in changes.items()
        }
        return call | dict(norm=norm._replace(**drawn))

    return change


def with_mean(offset: float) -> Change:
    """A stream of a large mean."""
    return lambda call: call | dict(h=call["h"] + offset)


OF_ITS_OWN = with_norm(weight=31, bias=32)
EPSILON = with_norm(eps=0.3)  # as large as a variance, so that it counts


# ------------------------------------------------------------------------------------------------- the step index


def step_index(rows: int, step: int, conditions: int) -> StepIndex:
    """An executed step, and for each of so many rows a condition that is not the row's own number."""
    row_of = (torch.arange(rows, dtype=torch.int32, device=DEVICE) + 1) % conditions
    return StepIndex(torch.tensor([step], dtype=torch.int32, device=DEVICE), row_of)


def advancing(at: StepIndex) -> StepIndex:
    """The same, and a count that the operation advances by 2, between others that it must leave alone."""
    counts = torch.full((3,), 7, dtype=torch.int32, device=DEVICE)
    return at._replace(advance=Advance(counts[1:2], 2))


def assert_advanced(at: StepIndex) -> None:
    """That an operation did what ``advancing(at)`` asked for."""
    assert at.advance is not None
    step = int(at.step)
    assert at.advance.to._base is not None
    assert at.advance.to._base.tolist() == [7, step + 2, 7]
