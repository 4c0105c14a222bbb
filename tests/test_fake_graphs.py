"""The stand-in for CUDA graphs keeps its promises: nothing runs at capture, baked addresses, poison, refusals."""

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from fake_graphs import FakeGraph, FakeGraphs
from tiny import tiny_dit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ebcache_fast.errors import CaptureError
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops.operands import Norm, StepIndex

GRAD_MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def unwritten(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An allocation as the body of a capture would make it, without the marks that the test suite leaves in them."""
    made: Tensor = torch.ops.aten.empty.memory_format(shape, dtype=dtype, device="cpu")
    return made


class Computation:
    """Views, functional, in-place and out= operations, multiple outputs, an index, a number: x, w, step -> out, x."""

    def __init__(self) -> None:
        self.x, self.w, self.out = draw(3, 4), draw(4, 4, seed=1), torch.zeros(2, 3)
        self.out = self.out.double()
        self.step = torch.tensor([0], dtype=torch.int32)
        self.static = [self.x, self.w, self.out, self.step]

    def __call__(self) -> None:
        left, right = F.linear(F.layer_norm(self.x, (4,)), self.w.t()).chunk(2, dim=1)
        y = torch.addcmul(left, right, torch.where(left > 0, 1.0, left), out=unwritten(3, 2))
        values, indices = y.max(dim=1)
        self.out.index_copy_(0, self.step.long(), (values + indices + torch.arange(3, device=y.device))[None])
        self.x[:, 1].mul_(2).add_(self.out[0])
        self.out[1] -= 1.5 / values.reshape(3)

    def results(self) -> list[bytes]:
        return bits(self.static)


# ------------------------------------------------------------------------------------------------ capture and replay


@pytest.mark.parametrize("at_replay", GRAD_MODES)
@pytest.mark.parametrize("at_capture", GRAD_MODES)
def test_a_replay_equals_eager_bitwise_and_follows_new_values(
    at_capture: Callable[[], AbstractContextManager[None]], at_replay: Callable[[], AbstractContextManager[None]]
) -> None:
    eager, captured, graphs = Computation(), Computation(), FakeGraphs()
    with at_capture():
        graph = graphs.capture(captured, captured.static)
    for seed in range(3):
        eager()
        with at_replay():
            graph.replay()
        assert captured.results() == eager.results()
        for computation in (eager, captured):
            computation.x.copy_(draw(3, 4, seed=seed + 5))
            computation.step.fill_(seed % 2)
    assert (graphs.captures, graphs.replays) == (1, 3)


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_a_capture_executes_nothing(mode: Callable[[], AbstractContextManager[None]]) -> None:
    computation = Computation()
    before, random = computation.results(), torch.random.get_rng_state()
    versions = [tensor._version for tensor in computation.static]
    with mode():
        graph = FakeGraphs().capture(computation, computation.static)
    assert computation.results() == before
    assert torch.equal(torch.random.get_rng_state(), random)
    changed = [tensor._version for tensor in computation.static]
    graph.replay()
    assert computation.results() != before
    assert (
        versions != changed == [tensor._version for tensor in computation.static]
    )  # as CUDA: captures count, replays not


def test_a_body_that_raises_leaves_static_memory_as_it_was_and_holds_nothing() -> None:
    x, graphs, made = draw(3), FakeGraphs(), []

    def body() -> None:
        x.mul_(2)
        made.append(weakref.ref(x + 1))
        raise ArithmeticError

    before = bits([x])
    with pytest.raises(ArithmeticError):
        graphs.capture(body, [x])
    assert bits([x]) == before
    assert (graphs.captures, len(graphs.alive), made[0]()) == (0, 0, None)
    x.mul_(2)  # nothing of the capture is still on
    assert graphs.recorded == 2


def test_nodes_are_in_order_and_neither_views_nor_allocations_nor_changes_of_shape() -> None:
    x = draw(3, 4)

    def body() -> None:
        y = unwritten(4, 3)
        torch.mul(x.t()[:, :3], 2, out=y)
        y.t_().unsqueeze(0)
        x.view(-1)[:9].copy_(y.reshape(-1)[:9].sin())

    graph = FakeGraphs().capture(body, [x])
    assert graph.nodes == ("aten.mul.out", "aten.clone.default", "aten.sin.default", "aten.copy_.default")
    assert graph.nbytes == 8 * (12 + 12 + 9)


def test_an_empty_out_is_sized_by_its_operation() -> None:
    x = draw(3)

    def body() -> None:
        out = unwritten(0)
        torch.add(x, 1, out=out)
        x.copy_(out * 2)

    graph = FakeGraphs().capture(body, [x])
    expected = x
    for _ in range(3):
        expected = (expected + 1) * 2
        graph.replay()
        assert bits([x]) == bits([expected])


def test_overlapping_static_tensors_are_one_memory() -> None:
    memory = draw(6)
    head, tail = memory[:4], memory[2:]

    def body() -> None:
        head.add_(1)
        tail.mul_(3)

    before, expected = bits([memory]), memory.clone()
    graph = FakeGraphs().capture(body, [head, tail])
    assert bits([memory]) == before
    expected[:4] += 1
    expected[2:] *= 3
    graph.replay()
    assert bits([memory]) == bits([expected])


class Loud(TorchDispatchMode):
    """Fails at any operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


class LoudCalls(TorchFunctionMode):
    """Fails at any call of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def test_no_mode_sees_a_replay_and_autocast_does_not_change_it() -> None:
    x, w, out = draw(3, 4, dtype=torch.float32), draw(5, 4, dtype=torch.float32), torch.zeros(3, 5)
    graphs = FakeGraphs()
    graph = graphs.capture(lambda: void(out.copy_(x @ w.t())), [x, w, out])
    with torch.autocast("cpu", dtype=torch.bfloat16), Loud(), LoudCalls():
        graph.replay()
    assert bits([out]) == bits([x @ w.t()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = graphs.capture(lambda: void(out.copy_(x @ w.t())), [x, w, out])
    graph.replay()
    assert bits([out]) == bits([(x.bfloat16() @ w.t().bfloat16()).float()])


def void(_: object) -> None:
    """Nothing, which is what a body returns."""


# ------------------------------------------------------------------------------------------------ addresses


def doubled(weight: nn.Parameter) -> tuple[FakeGraph, Tensor]:
    out = torch.zeros_like(weight)
    return FakeGraphs().capture(lambda: void(torch.mul(weight.detach(), 2, out=out)), [weight, out]), out


def test_in_place_changes_of_a_parameter_are_followed() -> None:
    weight = nn.Parameter(draw(3))
    graph, out = doubled(weight)
    with torch.no_grad():
        weight.copy_(draw(3, seed=1))
    graph.replay()
    assert bits([out]) == bits([draw(3, seed=1) * 2])


def test_other_memory_of_a_parameter_is_not_followed() -> None:
    weight = nn.Parameter(draw(3))
    graph, out = doubled(weight)
    weight.data = draw(3, seed=1)
    graph.replay()
    assert bits([out]) == bits([draw(3) * 2])


def test_an_assigned_state_dict_is_not_followed() -> None:
    layer, x, out = nn.Linear(4, 4).double(), draw(2, 4), torch.zeros(2, 4).double()
    with torch.no_grad():
        old = layer(x)
        graph = FakeGraphs().capture(lambda: void(out.copy_(layer(x))), [*layer.parameters(), x, out])
        layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)
        graph.replay()
    assert bits([out]) == bits([old])


# ------------------------------------------------------------------------------------------------ poison


@pytest.mark.parametrize(
    ("dtype", "poison"),
    [
        (torch.float32, np.nan),
        (torch.bfloat16, np.nan),
        (torch.int32, 2**31 - 1),
        (torch.int64, 2**63 - 1),
        (torch.bool, 1),
    ],
)
def test_a_temporary_that_is_read_before_it_is_written_shows(dtype: torch.dtype, poison: float) -> None:
    x = torch.zeros(3, dtype=dtype)
    ours: list[Tensor] = []

    def body() -> None:
        temporary = unwritten(3, dtype=dtype)
        x.copy_(temporary)
        temporary.zero_()  # which the next replay must not find
        ours.append(temporary)

    graph = FakeGraphs().capture(body, [x])
    expected = torch.full((3,), poison, dtype=dtype)
    for _ in range(2):
        assert torch.equal(ours[0].nan_to_num(7), expected.nan_to_num(7))
        ours[0].zero_()  # whatever happens between replays
        graph.replay()
        assert torch.equal(x.nan_to_num(7), expected.nan_to_num(7))
        x.zero_()


def test_a_poisoned_index_is_out_of_range() -> None:
    x = draw(3)
    graph = FakeGraphs().capture(lambda: void(x.copy_(x[unwritten(3, dtype=torch.int64)])), [x])
    with pytest.raises(IndexError, match="out of bounds"):
        graph.replay()
    assert bits([x]) == bits([draw(3)])


def test_a_temporary_kept_by_the_body_is_poison_after_capture_and_replay() -> None:
    x, kept = draw(3), []
    graph = FakeGraphs().capture(lambda: kept.append(x + 1), [x])
    assert kept[0].isnan().all()
    graph.replay()
    assert kept[0].isnan().all()


# ------------------------------------------------------------------------------------------------ injected failures


def test_a_failure_at_any_node_leaves_static_memory_as_it_was() -> None:
    computation = Computation()
    before, rehearsal = computation.results(), FakeGraphs()
    names = rehearsal.capture(computation, computation.static).nodes
    assert rehearsal.recorded == len(names) > 10
    for k in range(rehearsal.recorded):
        graphs = FakeGraphs(fail_at=k)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            graphs.capture(computation, computation.static)
        assert computation.results() == before
        assert (graphs.captures, graphs.recorded) == (0, k + 1)
        assert graphs.capture(computation, computation.static).nodes == names  # it fails once
    assert FakeGraphs(fail_at=len(names)).capture(computation, computation.static).nodes == names


def test_a_failure_is_counted_over_all_captures_and_is_what_one_asks_for() -> None:
    x, graphs = draw(3), FakeGraphs(fail_at=3, failure=KeyboardInterrupt)
    for _ in range(3):
        graphs.capture(lambda: void(x.add_(1)), [x])
    with pytest.raises(KeyboardInterrupt):
        graphs.capture(lambda: void(x.add_(1)), [x])


def test_a_failed_replay_stops_there_leaves_poison_and_does_not_harm_the_graph() -> None:
    x, graphs, kept = torch.zeros(3), FakeGraphs(), []

    def body() -> None:
        kept.append(x + 1)
        x.copy_(kept[0])
        x.mul_(10)

    graph = graphs.capture(body, [x])
    graph.replay()
    assert graphs.replayed == 3
    for k, value in ((3, 0.0), (5, 1.0)):
        x.zero_()
        graphs.fail_replay_at = graphs.replayed + k - 3
        with pytest.raises(torch.cuda.OutOfMemoryError):
            graph.replay()
        assert x.eq(value).all()
        assert kept[0].isnan().all()
    x.zero_()
    graph.replay()
    assert x.eq(10).all()
    assert graphs.replays == 2


def test_a_graph_lives_as_long_as_it_is_held_and_no_longer() -> None:
    x, graphs = draw(3), FakeGraphs()
    gc.disable()
    try:
        graph = graphs.capture(lambda: void(x.add_(x + 1)), [x])
        assert set(graphs.alive) == {graph}
        with pytest.raises(CaptureError):
            graphs.capture(lambda: void(x.add_(1)[0].item()), [x])
        del graph
        assert not graphs.alive
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------ whole operations


class Stream:
    """Operands of gated_residual_norm_modulate."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.h, self.branch, self.u = (draw(2, 3, 16, seed=seed, dtype=dtype) for seed in range(3))
        self.tables = draw(3, 4, 2, 16, dtype=dtype)  # gate, shift, scale
        self.at = StepIndex(torch.tensor([1], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32))
        self.static = [self.h, self.branch, self.u, self.tables, self.at.step, self.at.row_of]

    def run(self, operations: ops.Operations) -> None:
        gate, shift, scale = self.tables
        norm = Norm(shift, scale, 1e-6)
        operations.gated_residual_norm_modulate(self.h, [self.branch], [gate], norm, self.at, self.u)
        self.branch.add_(self.u)


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize(
    ("operations", "dtype"),
    [(ops.TORCH, torch.float64), (ops.triton_operations(), torch.float32)],
    ids=["torch", "triton"],
)
def test_a_wrapped_operation_is_one_node(
    operations: ops.Operations, dtype: torch.dtype, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    eager, captured, graphs = Stream(dtype), Stream(dtype), FakeGraphs()
    wrapped = graphs.wrap(operations)
    assert wrapped.implementations() == operations.implementations()
    before = bits(captured.static)
    with mode():
        graph = graphs.capture(lambda: captured.run(wrapped), captured.static)
    assert graph.nodes == ("gated_residual_norm_modulate", "aten.add_.Tensor")
    assert graphs.recorded == 2
    assert bits(captured.static) == before
    for _ in range(2):
        eager.run(operations)
        graph.replay()
        assert bits(captured.static) == bits(eager.static)
    captured.at.step.fill_(3)
    eager.at.step.fill_(3)
    memory = [tensor.detach() for tensor in captured.static]
    captured.u.data = torch.zeros_like(captured.u)  # not followed, no more than by other nodes
    eager.run(wrapped)  # outside of a capture it just runs
    graph.replay()
    assert bits(memory) == bits(eager.static)
    assert graphs.recorded == 2


@pytest.mark.parametrize("missing", range(6))
def test_a_wrapped_operation_takes_static_memory_only(missing: int) -> None:
    stream, graphs = Stream(torch.float64), FakeGraphs()
    before, static = bits(stream.static), list(stream.static)
    del static[missing]
    with pytest.raises(CaptureError, match="neither static nor made"):
        graphs.capture(lambda: stream.run(graphs.wrap(ops.TORCH)), static)
    assert bits(stream.static) == before


def test_a_wrapped_operation_takes_temporaries_and_fails_on_request() -> None:
    x, graphs = draw(2, 3, 16), FakeGraphs(fail_at=3)
    wrapped = graphs.wrap(ops.TORCH)
    at = StepIndex(torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))

    def body() -> None:
        h = x * 2
        wrapped.gated_residual(h, (x,), (torch.ones(1, 1, 16, dtype=x.dtype, device=x.device),), at)
        x.copy_(h)

    graphs.fail_at = 2
    before = bits([x])
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture(body, [x, at.step, at.row_of])
    assert bits([x]) == before
    graph = graphs.capture(body, [x, at.step, at.row_of])
    assert graph.nodes == ("aten.mul.Tensor", "aten.ones.default", "gated_residual", "aten.copy_.default")
    graph.replay()
    assert bits([x]) == bits([draw(2, 3, 16) * 2 + draw(2, 3, 16)])


def test_what_a_wrapped_operation_refuses_ends_the_capture() -> None:
    x, graphs = draw(2, 3, 16), FakeGraphs()

    def body() -> None:
        x.add_(1)
        graphs.wrap(ops.TORCH).gated_residual(x, [x], [], StepIndex(x, x))  # a branch without a gate

    before = bits([x])
    with pytest.raises(ValueError, match="zip"):
        graphs.capture(body, [x])
    assert bits([x]) == before


def test_a_wrapped_operation_keeps_the_autocast_of_its_capture() -> None:
    x, weight, out = (draw(4, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    graphs = FakeGraphs()

    def attention(qkv: Tensor, heads: int, out: Tensor) -> None:
        out.copy_(qkv @ weight)

    wrapped = graphs.wrap(replace(ops.TORCH, attention=attention))
    assert (wrapped.name, wrapped.linear_gelu) == ("torch", None)
    assert wrapped.attention is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = graphs.capture(partial(wrapped.attention, x, 1, out), [x, out])
    graph.replay()
    assert bits([out]) == bits([(x.bfloat16() @ weight.bfloat16()).float()])


# ------------------------------------------------------------------------------------------------ quiet


def test_quiet_hears_everything_but_replays() -> None:
    x, graphs, at = draw(3), FakeGraphs(), StepIndex(*torch.zeros(2, 1, dtype=torch.int32))
    h = x[None, None]
    graph = graphs.capture(lambda: void(x.mul_(2)), [x])
    with graphs.quiet() as heard:
        graph.replay()
        graph.replay()
    assert heard == []
    with graphs.quiet() as heard:
        graph.replay()
        x.add_(1)
        graph.replay()
        torch.zeros(1, device="cpu")
        x[0].item()
        x.tolist()
        x.cpu()
    assert heard == [
        "aten.add_.Tensor",
        "aten.zeros.default",
        "aten.select.int",
        "aten._local_scalar_dense.default",
        "torch.Tensor.tolist",
        "torch.Tensor.cpu",
    ]
    x.add_(1)
    assert len(heard) == 6
    with graphs.quiet() as heard:
        graphs.wrap(ops.TORCH).gated_residual(h, [h], [h], at)
    assert "aten.add.out" in heard  # not as one: nothing is captured here
    with graphs.quiet() as heard:
        graphs.capture(lambda: void(x.mul_(2)), [x])
    assert "aten.mul_.Tensor" in heard  # a capture is not quiet


# ------------------------------------------------------------------------------------------------ a transformer


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transformers_blocks_replay_bitwise(
    dtype: torch.dtype, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    model, h, c = tiny_dit(dtype=dtype), draw(2, 4, 16, dtype=dtype), draw(2, 16, dtype=dtype)
    out, graphs = torch.zeros_like(h), FakeGraphs()

    def blocks(tokens: Tensor) -> Tensor:
        for block in model.blocks:
            tokens = block(tokens, c)
        return tokens.detach()

    static = [*model.parameters(), *model.buffers(), h, c, out]
    before = bits(static)
    with mode():
        graph = graphs.capture(lambda: void(out.copy_(blocks(h))), static)
    assert bits(static) == before
    assert sum("attention" in name for name in graph.nodes) == len(model.blocks)
    for seed in range(3):
        h.copy_(draw(2, 4, 16, seed=seed, dtype=dtype))
        graph.replay()
        assert bits([out]) == bits([blocks(h)])
