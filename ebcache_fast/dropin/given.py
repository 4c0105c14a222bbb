"""A tensor that its caller holds: known again by its memory, without a look at what that holds."""

from collections.abc import Hashable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Given:
    """Where a tensor lies. It keeps no tensor alive, and while it exists no other can come to lie in the same place."""

    def __init__(self, tensor: Tensor) -> None:
        self.place = place_of(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    @property
    def is_alive(self) -> bool:
        """Whether anybody still holds the tensor, or another view of its memory."""
        return not self._storage.expired()  # type: ignore[no-untyped-call]


def place_of(tensor: Tensor) -> Hashable:
    """The same for views of one place in memory, as of whoever slices a prompt anew at each step."""
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
