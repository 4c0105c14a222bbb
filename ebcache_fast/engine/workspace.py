"""The memory that a step works in: allocated at its first use, then at fixed addresses."""

import torch
from torch import Tensor


class Workspace:
    """Named buffers of one trajectory, each of one shape and dtype; what they hold means nothing between two steps."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of all buffers that there are so far."""
        return tuple(self._buffers.values())

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The buffer of this name and shape, in this dtype or the model's."""
        dtype = dtype or self._dtype
        key = name, shape, dtype
        if key not in self._buffers:
            with torch.inference_mode(mode=False):  # else only that mode could write to it
                self._buffers[key] = torch.empty(shape, dtype=dtype, device=self._device)
        return self._buffers[key]
