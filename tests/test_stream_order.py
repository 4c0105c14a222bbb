"""Streams that use one memory in turn: each waits for the one before it, and for nobody else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ebcache_fast.engine.stream_order import StreamOrder


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


def test_each_waits_for_the_one_before_it(on: Callable[[Stream], None]) -> None:
    first, second = Stream(), Stream()
    order = StreamOrder(torch.device("cuda", 1))
    for stream in (first, first, second, second, first):
        on(stream)
        order.join()
    assert second.waited_for == [first]
    assert first.waited_for == [second]


def test_a_cpu_has_none() -> None:
    StreamOrder(torch.device("cpu")).join()
