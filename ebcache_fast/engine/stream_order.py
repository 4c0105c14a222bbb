"""Memory that CUDA streams use one after another."""

from collections.abc import Iterable

import torch
from torch import Tensor


class StreamOrder:
    """Lets whatever stream comes next wait for the one that used the memory last; on a CPU there is no other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def join(self, memory: Iterable[Tensor]) -> None:
        """The current stream is the one that uses the memory from now on, to whomever it goes after that."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._last != stream:
                if self._last is not None:
                    stream.wait_stream(self._last)
                for tensor in memory:  # freed, it waits for this stream, which need not be the one that it was made on
                    tensor.record_stream(stream)
            self._last = stream
