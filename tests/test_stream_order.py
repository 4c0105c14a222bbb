"""Streams that use one memory in turn: each waits for the one before it, and for nobody else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_graphs import FakeGraphs
from fake_runs import plan_of
from tiny import tiny_dit
from torch import Tensor

from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.stream_order import StreamOrder
from ebcache_fast.engine.trajectory import ForwardTrajectory


class Stream:
    def __init__(self) -> None:
        self.waited_for: list[Any] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stream], None]:
    """Make a stream the current one of GPU 1."""

    def make_current(stream: Stream) -> None:
        streams = {torch.device("cuda", 1): stream}
        monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)

    return make_current


class Memory:
    def __init__(self) -> None:
        self.used_by: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.used_by.append(stream)


def test_each_waits_for_the_one_before_it_and_the_memory_knows_of_all(on: Callable[[Stream], None]) -> None:
    first, second, memory = Stream(), Stream(), Memory()
    order = StreamOrder(torch.device("cuda", 1), lambda: [memory])  # type: ignore[list-item]
    for stream in (first, first, second, second, first):
        on(stream)
        order.join()
    assert second.waited_for == [first]
    assert first.waited_for == [second]
    assert memory.used_by == [first, second, first]


def test_a_cpu_has_none() -> None:
    StreamOrder(torch.device("cpu"), lambda: pytest.fail("memory was asked for")).join()


CALLS: dict[str, Callable[[ForwardTrajectory, Tensor], object]] = {
    "guide": lambda run, x: run.guide(3.0),
    "give": lambda run, x: run.give(torch.zeros(2), torch.zeros(2)),
    "predict": lambda run, x: run.predict(0, x),
    "refresh": lambda run, x: run.run_full(1, x),
    "run_full_at": lambda run, x: run.run_full_at(0.5, x),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_joins_before_it_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream may be another one than the last call's, which may be at work still."""
    engine, x = Engine(tiny_dit(3, torch.float32)), torch.zeros(2, 4, 8, 8)
    run = engine.forward_run(plan_of(), Batch(torch.tensor([0, 1]), 2, 0, (4, 8, 8)), Tail(guarded=True))
    with torch.no_grad(), FakeGraphs().quiet() as heard:
        monkeypatch.setattr(StreamOrder, "join", lambda _: heard.append("join"))
        CALLS[name](run, x)
    written = next(i for i, name in enumerate(heard) if "copy_" in name or "fill_" in name)
    assert "join" in heard[:written]
