"""What the tests of the kernels share: where they run, guarded memory, and how near is near enough.

The rule of accuracy: against float64, a kernel's largest error is at most twice that of torch's own reference in the
same dtype, plus 2 ulp of the largest value.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU means Triton's interpreter
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 1024  # elements of sentinel on either side of a guarded tensor
SENTINEL = -777.0


def draw(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Normal numbers that ``dtype`` holds exactly, on the device of the tests."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset
    return values.to(dtype).to(DEVICE)


def in_place(tensor: Tensor) -> Tensor:
    """The same on the device of the tests with its very strides, which a copy has only of memory without gaps."""
    if tensor.is_meta:
        return tensor
    memory = tensor.new_empty(0).set_(tensor.untyped_storage()).to(DEVICE)
    return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def huge_zeros(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros that take memory only where they are written: for offsets that no 32-bit integer holds."""
    if DEVICE.type == "cuda":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    width = torch.finfo(dtype).bits // 8
    return torch.from_numpy(np.zeros(math.prod(shape) * width, np.uint8)).view(dtype).view(shape)


def amid_nan(tensor: Tensor) -> Tensor:
    """The same values at the same strides in memory that is NaN all around them, so that what is read beside shows."""
    size = 1 + sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.full((size + 2 * GUARD,), math.nan, dtype=tensor.dtype, device=DEVICE)
    return memory.as_strided(tensor.shape, tensor.stride(), GUARD).copy_(tensor)


class Guarded:
    """A tensor of NaN between two guards, to see that a kernel writes all of it and nothing else."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, values: Tensor | None = None) -> None:
        size = math.prod(shape)
        self._memory = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype, device=DEVICE)
        self.tensor = self._memory[GUARD : GUARD + size].view(*shape)
        self.tensor.copy_(torch.tensor(math.nan) if values is None else values)

    def written(self) -> Tensor:
        """The tensor, once its guards are whole and nothing in it is NaN."""
        assert (self._memory[:GUARD] == SENTINEL).all(), "memory before the tensor was written"
        assert (self._memory[-GUARD:] == SENTINEL).all(), "memory after the tensor was written"
        assert not self.tensor.isnan().any(), "some elements were not written"
        return self.tensor


def in_float64(value: Any) -> Any:
    """Every floating tensor in nested tuples, lists and dictionaries as float64 on the CPU, the rest as it is."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double() if value.is_floating_point() else value.detach().cpu()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(in_float64, value))
    if isinstance(value, dict):
        return {name: in_float64(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(in_float64, value))
    return value


def ulp(values: Tensor, dtype: torch.dtype) -> float:
    """The spacing of ``dtype`` at the largest magnitude among ``values``."""
    largest = float(values.abs().max())
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0


def assert_accurate(kernel: Tensor, torch_own: Tensor, exact: Tensor) -> None:
    """Hold a kernel's result against the float64 one by the rule of accuracy."""
    assert kernel.dtype == torch_own.dtype
    ours, theirs = (float((one.cpu().double() - exact).abs().max()) for one in (kernel, torch_own))
    allowed = 2 * theirs + 2 * ulp(exact, kernel.dtype)
    assert ours <= allowed, f"error {ours:.3g} is over {allowed:.3g}; torch's own is {theirs:.3g}"
