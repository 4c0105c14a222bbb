"""float8 (e4m3) from its definition: how far numbers in it lie apart, and rows rounded to it."""

import pytest
import torch
from accuracy import DEVICE
from torch import Tensor

from ebcache_fast.ops.operations import OLDEST_FLOAT8_ARCH

LARGEST = 448.0
HAS_NONE = DEVICE.type == "cuda" and torch.cuda.get_device_capability() < OLDEST_FLOAT8_ARCH
needs_float8 = pytest.mark.skipif(HAS_NONE, reason="float8 needs compute capability 8.9")


def half_a_step(values: Tensor) -> Tensor:
    """Half the distance between the numbers of e4m3 around these, in float64: 3 bits of mantissa, 2^-9 at the least."""
    exponents = values.double().abs().clamp(min=2.0**-6).log2().floor()
    return 2.0 ** (exponents - 4)


def rounded(values: Tensor) -> Tensor:
    """The nearest numbers of e4m3 to these, of 448 or less, ties to even; in their own dtype."""
    step = (2 * half_a_step(values)).to(values.dtype)
    return (values / step).round() * step


def rounded_rows(rows: Tensor) -> Tensor:
    """Rows (..., D) as they are after they were quantised, each by a float32 scale of its own."""
    scale = (rows.abs().amax(-1, keepdim=True).float() / LARGEST).to(rows.dtype)
    return rounded(rows / scale) * scale


def largest_error(rows: Tensor) -> Tensor:
    """By how much each element of rows (..., D) can be wrong after that, at most."""
    scale = rows.abs().amax(-1, keepdim=True).double() / LARGEST
    return half_a_step(rows / scale) * scale
