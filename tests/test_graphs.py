"""What surrounds a capture by CUDA, over stand-ins for its calls: a capture that fails is left behind."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ebcache_fast.engine.graphs import CudaGraphs


class CaptureFailedError(Exception):
    """As torch raises at the end of a capture that was broken."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whatever is asked of CUDA, in order; captures end well unless their body fails."""
    made: list[Any] = []
    pools = count()

    @contextmanager
    def graph(made_of: Any, **options: Any) -> Iterator[None]:
        made.append(("capture", options["pool"], options["capture_error_mode"]))
        try:
            yield
        except RuntimeError as error:
            raise CaptureFailedError from error  # the stream stays the current one
        made.append("captured")

    current = SimpleNamespace(wait_stream=lambda other: made.append("the current stream waits"))
    stand_ins: dict[str, Any] = {
        "graph_pool_handle": lambda: next(pools),
        "device": lambda device: nullcontext(),
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: made.append("the new stream waits")),
        "current_stream": lambda: current,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "graph": graph,
        "set_stream": lambda stream: made.append(("set_stream", stream is current)),
        "current_device": lambda: 3,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *ended: made.append(("ended", *ended)))
    return made


def body_that(calls: list[Any], fail: Callable[[], object] = lambda: None) -> Callable[[], None]:
    def body() -> None:
        calls.append("body")
        if calls.count("body") % 2 == 0:  # not in the warm-up
            calls.append(f"collects: {gc.isenabled()}")
            fail()

    return body


def fail() -> None:
    raise RuntimeError


USUAL = ["the new stream waits", "body", "the current stream waits"]


def test_the_body_runs_once_before_and_once_in_the_capture(calls: list[Any]) -> None:
    graphs = CudaGraphs(torch.device("cuda", 3))
    graphs.capture(body_that(calls), ())
    captured = [*USUAL, ("capture", 0, "thread_local"), "body", "collects: False", "captured"]
    assert calls == captured
    graphs.capture(body_that(calls), ())
    assert calls == captured * 2  # in one pool
    assert gc.isenabled()


def test_a_capture_that_fails_leaves_its_stream_and_its_pool(calls: list[Any]) -> None:
    graphs = CudaGraphs(torch.device("cuda", 3))
    with pytest.raises(CaptureFailedError):
        graphs.capture(body_that(calls, fail), ())
    assert calls[-2:] == [("set_stream", True), ("ended", 3, 0)]
    assert gc.isenabled()
    calls.clear()
    graphs.capture(body_that(calls), ())
    assert ("capture", 1, "thread_local") in calls


def test_a_pool_that_was_left_already(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("not recording")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", refuse)
    with pytest.raises(CaptureFailedError):
        CudaGraphs(torch.device("cuda", 3)).capture(body_that(calls, fail), ())
