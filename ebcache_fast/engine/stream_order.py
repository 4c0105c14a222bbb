"""Memory that CUDA streams use one after another."""

import torch


class StreamOrder:
    """Lets whatever stream comes next wait for the one that used the memory last; on a CPU there is no other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def join(self) -> None:
        """The current stream is the one that uses the memory from now on."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
