"""The engine over fake graphs when something fails: at every operation of every capture, replay and eager step."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, MLP, NO
from depth import deep
from fake_graphs import FakeGraphs
from fake_runs import (
    SMALLEST,
    Job,
    bits,
    call,
    calls,
    eager_states,
    enable_over,
    engine_of,
    no_graphs,
    over,
    plan_of,
    sampling,
    states,
)
from tiny import tiny_dit
from torch import Tensor

from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.trajectory import Trajectory
from ebcache_fast.errors import CaptureError, InputError, TrajectoryError
from ebcache_fast.models import DiT
from ebcache_fast.ops import operations as ops

JOB = Job(plan_of((NO, ATTENTION, ATTN_MLP, ATTN_MLP, MLP), depth=1), labels=(3,))
FAILED = "capture failed with OutOfMemoryError"


def tiny() -> DiT:
    return tiny_dit(0, torch.float32, **SMALLEST, depth=1)


MODEL = tiny()
EXPECTED = bits(eager_states(MODEL, JOB))
ANSWERS = bits(calls(enable_over(no_graphs, tiny(), JOB.plan), JOB))


def whole_operations(graphs: FakeGraphs) -> ops.Operations:
    """Torch's, one node each, as kernels are."""
    return graphs.wrap(ops.TORCH)


def engine_over(graphs: FakeGraphs, **options: bool | int) -> Engine:
    return Engine(MODEL, EngineOptions(**options), whole_operations(graphs), over(graphs))


def nodes(run: Callable[[FakeGraphs], object]) -> int:
    """How many nodes are recorded where nothing fails."""
    graphs = FakeGraphs()
    run(graphs)
    return graphs.recorded


# --------------------------------------------------------------------------------------------------------- capture


def own(graphs: FakeGraphs) -> tuple[list[bytes], Engine]:
    engine = engine_over(graphs)
    return bits(states(engine, JOB)), engine


def drop_in(graphs: FakeGraphs) -> tuple[list[bytes], Engine]:
    model = enable_over(over(graphs), tiny(), JOB.plan, whole_operations(graphs), in_order=True)
    return bits(calls(model, JOB)), engine_of(model)


@pytest.mark.parametrize(
    ("run", "expected", "every"), [(own, EXPECTED, 1), (drop_in, ANSWERS, 5), deep(drop_in, ANSWERS, 1)]
)
def test_a_capture_that_fails_at_any_node_falls_back_for_that_work_alone(
    run: Callable[[FakeGraphs], tuple[list[bytes], Engine]],
    expected: list[bytes],
    every: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    everything = []
    for fatal in range(0, nodes(run), every):
        everything.append(graphs := FakeGraphs(fail_at=fatal))
        with caplog.at_level(logging.WARNING, "ebcache_fast"):
            found, engine = run(graphs)
        assert found == expected, fatal
        stats = engine.stats
        assert graphs.captures == stats.graphs == 3
        assert list(stats.eager) == [FAILED]
        assert len(caplog.records) == 1
        assert FAILED in caplog.text
        caplog.clear()
    del engine
    gc.collect()
    assert not any(graphs.alive for graphs in everything)


def test_every_capture_fails_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class NoGraphs(FakeGraphs):
        def count_recorded(self) -> None:
            raise torch.OutOfMemoryError

    engine = engine_over(NoGraphs())
    for job in (JOB, JOB, replace(JOB, labels=(1, 2))):
        assert bits(states(engine, job)) == bits(eager_states(MODEL, job))
    assert dict(engine.stats.eager) == {FAILED: 3 * len(JOB.plan)}
    assert (engine.stats.replays, engine.stats.graphs) == (0, 0)
    assert caplog.text.count(FAILED) == 1


def test_with_strict_a_capture_that_fails_raises_and_leaves_the_engine_usable() -> None:
    for fatal in range(nodes(own)):
        graphs = FakeGraphs(fail_at=fatal)
        engine = engine_over(graphs, strict=True, max_trajectories=1)
        with pytest.raises(CaptureError, match=FAILED) as error:
            states(engine, JOB)
        assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
        assert bits(states(engine, JOB)) == EXPECTED
        assert (graphs.captures, dict(engine.stats.eager)) == (4, {})


def test_what_is_no_error_but_ends_a_task_goes_through_a_capture_and_leaves_the_engine_usable() -> None:
    graphs = FakeGraphs(fail_at=5, failure=KeyboardInterrupt)
    engine = engine_over(graphs, max_trajectories=1)
    with pytest.raises(KeyboardInterrupt):
        states(engine, JOB)
    assert bits(states(engine, JOB)) == EXPECTED
    assert dict(engine.stats.eager) == {}


def hook(model: DiT) -> AbstractContextManager[Any]:
    return model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)


def autocast(_: DiT) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(("watch", "why"), [(hook, "the model's layers have hooks"), (autocast, "autocast")])
def test_python_that_a_graph_would_not_run_is_run(watch: Callable[[DiT], Any], why: str) -> None:
    model, graphs = tiny(), FakeGraphs()
    lenient, strict = (Engine(model, EngineOptions(strict=s), make_graphs=over(graphs)) for s in (False, True))
    for engine in (lenient, strict):
        assert bits(states(engine, JOB)) == EXPECTED
    with watch(model):
        found, expected = bits(states(lenient, JOB)), bits(eager_states(model, JOB))
        with pytest.raises(CaptureError, match=why):
            states(strict, JOB)
    assert found == expected
    assert dict(lenient.stats.eager) == {why: len(JOB.plan)}
    for engine in (lenient, strict):
        replays = engine.stats.replays
        assert bits(states(engine, JOB)) == EXPECTED
        assert engine.stats.replays == replays + 4


# ---------------------------------------------------------------------------------------------------------- replay


def finish(trajectory: Trajectory) -> None:
    while trajectory.advance():
        pass


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "whole"])
@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_replay_that_fails_at_any_node_says_so_and_the_next_run_is_right(
    whole: bool, failure: Callable[[], BaseException]
) -> None:
    graphs = FakeGraphs(failure=failure)
    engine = engine_over(graphs, max_trajectories=1, whole_trajectory=whole)
    states(engine, JOB)
    for fatal in range(graphs.replayed):
        graphs.fail_replay_at = graphs.replayed + fatal
        with sampling(engine, JOB) as trajectory:
            with pytest.raises(failure):  # type: ignore[arg-type]
                finish(trajectory)
            with pytest.raises(TrajectoryError, match="a step of this run failed"):
                trajectory.advance()
        assert bits(states(engine, JOB)) == (EXPECTED[-1:] if whole else EXPECTED), fatal
    assert graphs.captures == (1 if whole else 4)


def test_a_replay_that_fails_leaves_the_others_in_progress_alone() -> None:
    graphs = FakeGraphs()
    engine = engine_over(graphs)
    for launches in range(4):
        with sampling(engine, JOB) as ours, sampling(engine, JOB) as theirs:
            found = []
            for _ in range(launches):
                ours.advance()
                found.append(ours.x.clone())
            graphs.fail_replay_at = graphs.replayed + 3
            with pytest.raises(torch.OutOfMemoryError):
                theirs.advance()
            while ours.advance():
                found.append(ours.x.clone())
            assert bits(found) == EXPECTED


def test_a_call_of_the_drop_in_that_failed_can_be_made_again() -> None:
    graphs = FakeGraphs()
    model = enable_over(over(graphs), tiny(), JOB.plan, whole_operations(graphs), strict=True)
    assert bits(calls(model, JOB)) == ANSWERS
    for fatal in range(graphs.replayed):
        graphs.fail_replay_at = graphs.replayed + fatal
        answers, failures = [], 0
        while len(answers) < len(JOB.plan):
            try:
                answers.append(call(model, JOB, len(answers)))
            except torch.OutOfMemoryError:
                failures += 1
        assert (bits(answers), failures) == (ANSWERS, 1), fatal


@pytest.mark.parametrize("in_order", [False, True])
def test_a_run_begins_again_after_a_call_that_failed(in_order: bool) -> None:
    graphs = FakeGraphs()
    model = enable_over(over(graphs), tiny(), JOB.plan, whole_operations(graphs), in_order=in_order)
    calls(model, JOB)
    for fatal in range(graphs.replayed):
        graphs.fail_replay_at = graphs.replayed + fatal
        with pytest.raises(torch.OutOfMemoryError):
            calls(model, JOB)
        assert bits(calls(model, JOB)) == ANSWERS, fatal


# ----------------------------------------------------------------------------------------------------------- eager


class Faulty:
    """Operations of which one call fails, before or after it did its work."""

    def __init__(self) -> None:
        self.calls, self.fatal = 0, -1
        self._late = False

    def fail(self, fatal: int, *, late: bool) -> None:
        """Fail at this call from now."""
        self.calls, self.fatal, self._late = 0, fatal, late

    def operations(self) -> ops.Operations:
        """Torch's, with that fault."""
        found = {name: value for name, value in vars(ops.TORCH).items() if callable(value)}
        return replace(ops.TORCH, **{name: partial(self._run, operation) for name, operation in found.items()})

    def _run(self, operation: Callable[..., None], *args: Any) -> None:
        is_fatal, self.calls = self.calls == self.fatal, self.calls + 1
        if is_fatal and not self._late:
            raise ArithmeticError
        operation(*args)
        if is_fatal:
            raise ArithmeticError


@pytest.mark.parametrize("late", [False, True])
def test_an_eager_step_that_fails_says_so_and_the_next_run_is_right(late: bool) -> None:
    faulty = Faulty()
    engine = Engine(MODEL, EngineOptions(max_trajectories=1), faulty.operations(), no_graphs)
    states(engine, JOB)
    for fatal in range(faulty.calls):
        faulty.fail(fatal, late=late)
        with pytest.raises(ArithmeticError):
            states(engine, JOB)
        assert bits(states(engine, JOB)) == EXPECTED, fatal


@pytest.mark.parametrize("late", [False, True])
def test_an_eager_call_of_the_drop_in_that_failed_can_be_made_again(late: bool) -> None:
    faulty = Faulty()
    model = enable_over(no_graphs, tiny(), JOB.plan, faulty.operations(), strict=True)
    calls(model, JOB)
    for fatal in range(faulty.calls):
        faulty.fail(fatal, late=late)
        answers: list[Tensor] = []
        while len(answers) < len(JOB.plan):
            with suppress(ArithmeticError):
                answers.append(call(model, JOB, len(answers)))
        assert bits(answers) == ANSWERS, fatal


# ---------------------------------------------------------------------------------------------------------- memory


@contextmanager
def no_memory(room: int = 0) -> Iterator[None]:
    """After ``room`` more allocations through torch.empty there is no memory."""
    left, empty = [room], torch.empty

    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nAnd more.")
        return empty(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", allocate)
        yield


NOISE = 1
ALLOCATIONS = 6


@pytest.mark.parametrize("room", range(NOISE, NOISE + ALLOCATIONS))
def test_too_little_memory_for_our_own_loop(room: int) -> None:
    graphs = FakeGraphs()
    engine = engine_over(graphs, max_trajectories=1)
    with no_memory(room), pytest.raises(InputError, match=r"2 rows needs .* GiB .*Tried to allocate 7 GiB.\); sample"):
        states(engine, JOB)
    assert bits(states(engine, JOB)) == EXPECTED
    assert graphs.captures == 4


@pytest.mark.parametrize("in_order", [False, True])
def test_too_little_memory_for_the_drop_in(in_order: bool) -> None:
    graphs, model, plain = FakeGraphs(), tiny(), tiny()
    enable_over(over(graphs), model, JOB.plan, in_order=in_order)
    with no_memory():
        assert bits(calls(model, JOB)) == bits(calls(plain, JOB))
    stats = engine_of(model).stats
    assert (stats.replays, stats.graphs, graphs.captures) == (0, 0, 0)
    assert bits(calls(model, JOB)) == ANSWERS
