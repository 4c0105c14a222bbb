"""What a device reaches at most, measured in the same run as whatever is held against it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernel_contenders import BoundCall, Work, interleaved, timer


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches in the same run: medians."""

    bytes_per_second: float  # of a copy, read and written
    flops_per_second: float  # of a bfloat16 product of two square matrices

    def floor_seconds(self, least: Work) -> float:
        """The time under which nothing that does this work can come."""
        return max(least.bytes / self.bytes_per_second, least.flops / self.flops_per_second)

    def binding(self, least: Work) -> str:
        """Which of the two sets the floor."""
        by_memory = least.bytes / self.bytes_per_second >= least.flops / self.flops_per_second
        return "memory" if by_memory else "matrix products"


def product_rates(
    shapes: Mapping[str, tuple[int, int, int]], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, float]:
    """FLOP a second of ``u @ weight.T`` with a bias, by name; shapes are (M, K, N), random data."""
    timers = {}
    for name, (rows, inner, outer) in shapes.items():
        u, weight = (torch.randn(size, inner, dtype=dtype, device=device) for size in (rows, outer))
        call = BoundCall(name, (u, weight, torch.randn(outer, dtype=dtype, device=device)))
        timers[name] = timer(F.linear, [call], device)
    taken = interleaved(rounds, timers)
    return {name: 2 * math.prod(shapes[name]) / sorted(seconds)[rounds // 2] for name, seconds in taken.items()}


def measure_ceilings(device: torch.device, rounds: int) -> Ceilings:
    """Copy 4 GiB and multiply 8192^3 on a GPU, far less on a CPU; random data, because zeros run faster."""
    elements, side = (2**31, 8192) if device.type == "cuda" else (2**22, 128)
    source = torch.randn(elements, dtype=torch.bfloat16, device=device)
    copy = BoundCall("copy", (torch.empty_like(source), source))
    left, right = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
    product = BoundCall("product", (left, right))
    timers = {"copy": timer(Tensor.copy_, [copy], device), "product": timer(torch.mm, [product], device)}
    seconds = {name: sorted(taken)[rounds // 2] for name, taken in interleaved(rounds, timers).items()}
    return Ceilings(2 * source.nbytes / seconds["copy"], 2 * side**3 / seconds["product"])
