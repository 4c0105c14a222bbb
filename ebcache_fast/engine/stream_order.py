"""Memory that CUDA streams use one after another."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class StreamOrder:
    """Lets whatever stream comes next wait for the one that used the memory last; on a CPU there is no other.

    memory: gives the tensors of which this is the order.
    """

    def __init__(self, device: torch.device, memory: Callable[[], Iterable[Tensor]]) -> None:
        self._device, self._memory = device, memory
        self._last: torch.cuda.Stream | None = None

    def join(self) -> None:
        """Let the current stream be the one that uses the memory from now on; before anything touches it."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last != stream:
            if self._last is not None:
                stream.wait_stream(self._last)
            for tensor in self._memory():  # freed, it waits for this stream, perhaps not the one it was made on
                tensor.record_stream(stream)
        self._last = stream
