"""CUDA graphs: a piece of work over static memory, captured once and replayed with one launch."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """Captured work that can be replayed."""

    def replay(self) -> None:
        """Run it on the current stream, over what its memory holds now."""
        ...


class Graphs(Protocol):
    """Capturer of graphs over one set of buffers."""

    def capture(self, body: Callable[[], None], static: Sequence[Tensor]) -> Graph:
        """Capture ``body``, which ran at least once before, and touches no memory older than itself but ``static``.

        What it captures is not executed. Raises whatever keeps it from being captured, and leaves nothing behind.
        """
        ...


class CudaGraphs:
    """Capturer of CUDA graphs, which share the memory of their temporaries: replay one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin_anew()

    def capture(self, body: Callable[[], None], static: Sequence[Tensor]) -> Graph:
        """Capture on one stream, see `Graphs.capture`: within a pool, memory goes from graph to graph on it alone."""
        with torch.cuda.device(self._device):
            current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            capturing = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            try:
                with _workspaces_in_the_pool(), capturing, _no_garbage_collection():
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
        self._begin_anew()  # the old pool can't be captured into again

    def _begin_anew(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]


def cuda_graphs(device: torch.device) -> Graphs | None:
    """The capturer for a device; None where nothing can be captured."""
    return CudaGraphs(device) if device.type == "cuda" else None


def no_graphs(device: torch.device) -> None:
    """Capture nothing, whatever the device."""


@contextmanager
def _workspaces_in_the_pool() -> Iterator[None]:
    """Let cuBLAS get its workspace within the capture, from the graph's pool, and nobody else have it afterwards.

    torch keeps one for each stream. A graph would go on writing to it after others took it over, or after it was given
    back to the device, which torch.compile's own graphs bring about wherever they are recorded: they do the same.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


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
