"""CUDA graphs: a piece of work over static memory, captured once and replayed with one launch."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Run it on the current stream, over what its memory holds now."""
        ...


class Graphs(Protocol):
    """What captures."""

    def capture(self, body: Callable[[], None], static: Sequence[Tensor]) -> Graph:
        """Capture ``body``, which ran at least once before, and touches no memory older than itself but ``static``.

        What it captures is not executed. Raises whatever keeps it from being captured, and leaves nothing behind.
        """
        ...


class CudaGraphs:
    """CUDA's. All graphs that one of these captured share the memory of their temporaries: replay one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], None], static: Sequence[Tensor]) -> Graph:
        """See `Graphs.capture`. The body is run once more before, on the stream of the capture.

        Every graph has a stream of its own: those of one stream would share cuBLAS's workspace.
        """
        with torch.cuda.device(self._device):
            stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                body()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            capturing = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
            try:
                with capturing, _no_garbage_collection():
                    body()
            except BaseException:
                self._recover(current)
                raise
        return graph

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Leave a capture that failed: torch, whose own end of it fails too, stays on its stream and in its pool."""
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # where it did end
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()  # the old one can't be captured into again


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector away: a CUDA object that it frees would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
