"""What surrounds a capture by CUDA, over stand-ins for its calls: a capture that fails is left behind."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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
    pools, streams = count(), count()

    @contextmanager
    def graph(made_of: Any, **options: Any) -> Iterator[None]:
        made.append(("capture", options["pool"], options["stream"], options["capture_error_mode"]))
        try:
            yield
        except RuntimeError as error:
            raise CaptureFailedError from error  # the stream stays the current one
        made.append("captured")

    current = object()
    stand_ins: dict[str, Any] = {
        "graph_pool_handle": lambda: next(pools),
        "device": lambda device: nullcontext(),
        "Stream": lambda device: next(streams),
        "current_stream": lambda: current,
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "graph": graph,
        "set_stream": lambda stream: made.append(("set_stream", stream is current)),
        "current_device": lambda: 3,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *ended: made.append(("ended", *ended)))
    forget = partial(made.append, "forgets cuBLAS's workspaces")
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", forget, raising=False)  # not on a CPU
    return made


def body_that(calls: list[Any], fail: Callable[[], object] = lambda: None) -> Callable[[], None]:
    def body() -> None:
        calls.append(f"body, collects: {gc.isenabled()}")
        fail()

    return body


def fail() -> None:
    raise RuntimeError


def test_workspaces_are_of_the_graphs_and_nobody_elses(calls: list[Any]) -> None:
    graphs = CudaGraphs(torch.device("cuda", 3))
    graphs.capture(body_that(calls), ())
    forgets, begins = "forgets cuBLAS's workspaces", ("capture", 0, 0, "thread_local")
    captured = [forgets, begins, "body, collects: False", "captured", forgets]
    assert calls == captured
    graphs.capture(body_that(calls), ())
    assert calls == captured * 2  # in one pool and on one stream, without which no memory of the pool is used again
    assert gc.isenabled()


def test_a_capture_that_fails_leaves_its_stream_and_its_pool(calls: list[Any]) -> None:
    graphs = CudaGraphs(torch.device("cuda", 3))
    with pytest.raises(CaptureFailedError):
        graphs.capture(body_that(calls, fail), ())
    assert calls[-3:] == ["forgets cuBLAS's workspaces", ("set_stream", True), ("ended", 3, 0)]
    assert gc.isenabled()
    calls.clear()
    graphs.capture(body_that(calls), ())
    assert ("capture", 1, 1, "thread_local") in calls


def test_a_pool_that_was_left_already(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("not recording")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", refuse)
    with pytest.raises(CaptureFailedError):
        CudaGraphs(torch.device("cuda", 3)).capture(body_that(calls, fail), ())
