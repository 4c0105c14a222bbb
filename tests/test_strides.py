"""Weights and inputs that lie in memory in another order than usual, as ``torch.channels_last`` or views of others."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from accuracy import DEVICE, draw
from depth import deep
from diffusers_kinds import COG_5B, DIT, SIGMA, Kind, ask, table_of, timesteps
from kernel_operations import OF_ITS_OWN, Operation, mapped, tensors
from step_operands import EMBED, EMBED_NORM, PREDICT, RUN, UPDATE
from stream_operands import RESIDUAL_NORM
from tiny import relative_error
from torch import Tensor

from ebcache_fast import enable, stats
from ebcache_fast.kernels import launch
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops.operands import Linear
from ebcache_fast.ops.operations import own_matmul_operations

TRITON = replace(own_matmul_operations(), linear_gelu=None, attention=None)


def in_channels_last(tensor: Tensor) -> Tensor:
    """Channels side by side, of images and videos; others with their axes in the opposite order."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.ndim in formats:
        return tensor.contiguous(memory_format=formats[tensor.ndim])
    axes = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(axes).contiguous().permute(axes)


def spread(tensor: Tensor) -> Tensor:
    """Every third element of a larger memory, from its second on."""
    memory = tensor.new_zeros(*tensor.shape, 3)
    memory[..., 1] = tensor
    return memory[..., 1]


def behind_another(tensor: Tensor) -> Tensor:
    """As usual, but one element behind where a wide load could begin."""
    return torch.cat([tensor.new_ones(1), tensor.flatten()])[1:].view(tensor.shape)


LAID = (in_channels_last, spread, behind_another)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: {80: ((launch.ALL, launch.Launch(16, 128, 4)),)} for name in launch.TABLE}
    table["linear_gelu"] = launch.TABLE["linear_gelu"]
    monkeypatch.setattr(launch, "TABLE", table)


WEIGHTS = {
    "patches.weight",
    "patches.bias",
    "patches.positions",
    "linear.weight",
    "linear.bias",
    "norm.weight",
    "norm.bias",
}
OPERATIONS_WITH_WEIGHTS = (EMBED, EMBED_NORM, RESIDUAL_NORM, PREDICT, UPDATE, RUN)


@pytest.mark.parametrize("lay", LAID)
@pytest.mark.parametrize("operation", OPERATIONS_WITH_WEIGHTS, ids=str)
def test_a_kernel_reads_weights_as_they_lie(operation: Operation, lay: Callable[[Tensor], Tensor]) -> None:
    call = operation.call()
    call = OF_ITS_OWN(call) if "norm" in call else call
    weights = {path for path, _ in tensors(call)} & WEIGHTS
    written = []
    for put in (Tensor.clone, lay):
        laid = mapped(lambda path, tensor, put=put: (put if path in weights else Tensor.clone)(tensor), call)
        operation.kernel(**laid)
        written.append([tensor for path, tensor in tensors(laid) if path in operation.written])
    assert weights
    assert all(map(torch.equal, *written))


@pytest.mark.parametrize("lay", LAID)
def test_the_first_half_of_the_mlp_reads_weights_as_they_lie(lay: Callable[[Tensor], Tensor]) -> None:
    u, weight, bias = (draw(*shape, dtype=torch.float32, seed=1) for shape in ((32, 48), (64, 48), (64,)))
    outs = [torch.empty(32, 64, device=DEVICE) for _ in range(2)]
    for out, linear in zip(outs, (Linear(weight, bias), Linear(lay(weight), lay(bias))), strict=True):
        own_matmul_operations().linear_gelu(u, linear, out)  # type: ignore[misc]
    assert torch.equal(*outs)


OPERATIONS = pytest.mark.parametrize(
    ("kind", "operations"),
    [
        *((kind, ops.TORCH) for kind in (DIT, SIGMA, COG_5B)),
        (DIT, TRITON),
        *(deep(kind, TRITON) for kind in (SIGMA, COG_5B)),
    ],
    ids=lambda one: getattr(one, "name", None),
)


@torch.no_grad()
def drawn_as(kind: Kind, operations: ops.Operations, patch: pytest.MonkeyPatch, lay: Callable[[Any], None]) -> Tensor:
    """Drawn by a pipeline whose transformer was laid out anew before it was enabled."""
    pipe = kind.pipeline()
    lay(pipe.transformer)
    patch.setattr(ops, "select", lambda *_, **__: operations)
    enable(pipe, table_of(pipe))
    x = kind.draw(pipe)
    assert not stats(pipe).originals
    assert not stats(pipe).refreshed
    assert stats(pipe).operations["gated_sum"] == operations.name
    return x


def as_it_comes(transformer: Any) -> None:
    """Leave it alone."""


def by_turns(transformer: Any) -> None:
    """Lay one parameter after another out in another way; a third of them in each."""
    for parameter, lay in zip(transformer.parameters(), cycle(LAID), strict=False):
        parameter.data = lay(parameter.data)


def to_channels_last(transformer: Any) -> None:
    """As diffusers' pages advise."""
    transformer.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("lay", [by_turns, deep(to_channels_last)])
@OPERATIONS
def test_pipelines_draw_the_same_however_their_weights_lie(
    kind: Kind, operations: ops.Operations, lay: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drawn_as(kind, ops.TORCH, monkeypatch, as_it_comes)
    assert relative_error(drawn_as(kind, operations, monkeypatch, lay), expected) <= 1e-5


@OPERATIONS
def test_calls_are_answered_however_their_tensors_lie(
    kind: Kind, operations: ops.Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents, labels, texts, masks and rotary embeddings."""
    pipe = kind.pipeline()
    usual, ts = kind.call(pipe), timesteps(pipe)[:3]
    monkeypatch.setattr(ops, "select", lambda *_, **__: operations)
    enable(pipe, table_of(pipe))
    expected = [ask(pipe.transformer, usual, t, i) for i, t in enumerate(ts)]
    monkeypatch.setattr(torch, "randn", lambda *args, randn=torch.randn, **named: spread(randn(*args, **named)))
    laid = {name: _laid(value) for name, value in usual.items()}
    ours = [ask(pipe.transformer, laid, t, i) for i, t in enumerate(ts)]
    assert all(relative_error(one, other) <= 1e-5 for one, other in zip(ours, expected, strict=True))
    assert not stats(pipe).originals


def _laid(value: Any) -> Any:
    if isinstance(value, Tensor):
        return in_channels_last(value) if value.ndim > 3 else spread(value)
    return type(value)(map(_laid, value)) if isinstance(value, tuple | list) else value
