"""How each kernel is launched: a fixed table by rows and architecture, found offline by bench/tune.py.

Nothing is tuned at run time: a captured graph must not depend on what else the card did while it was made.

Every launcher of a fused operation has a keyword ``early``: launch while the kernel before still runs (programmatic
dependent launch, from compute capability 9.0), and wait for its results inside; see `_order`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

SMALLEST_DOT = 16  # rows, columns and depth of the smallest matrix product
DEFAULT_ARCH = 90  # of tensors that are on no GPU: what the interpreter and offline compiles run


class Launch(NamedTuple):
    """One program's share of the work, and its resources."""

    rows: int  # rows of the residual stream, or tokens, a program
    cols: int  # channels a program, or a step of its loop
    warps: int
    stages: int = 1  # loads in flight, of kernels that loop over cols


# By kernel, then by architecture, then by the number of rows up to which an entry holds, in rising order. An
# architecture that has no entry of its own takes the nearest older one.
Entries = tuple[tuple[float, Launch], ...]
ALL = float("inf")
TABLE: Mapping[str, Mapping[int, Entries]] = {
    "gated_residual": {80: ((4096, Launch(rows=1, cols=0, warps=4)), (ALL, Launch(rows=4, cols=0, warps=8)))},
    "gated_sum": {80: ((ALL, Launch(rows=16, cols=128, warps=4, stages=5)),)},
    "embed": {80: ((ALL, Launch(rows=16, cols=128, warps=4)),)},
    "head": {80: ((ALL, Launch(rows=16, cols=128, warps=8)),), 100: ((ALL, Launch(rows=16, cols=64, warps=4)),)},
    "run": {80: ((ALL, Launch(rows=16, cols=128, warps=8)),)},
    "linear_gelu": {
        80: ((1024, Launch(64, 128, 4, 4)), (ALL, Launch(128, 128, 8, 4))),
        90: ((1024, Launch(64, 128, 4, 4)), (ALL, Launch(128, 128, 8, 3))),
    },
    "attention": {
        80: ((1024, Launch(64, 64, 4, 2)), (ALL, Launch(128, 64, 8, 2))),
        90: ((1024, Launch(64, 64, 4, 2)), (ALL, Launch(128, 128, 8, 2))),
    },
}


def arch_of(device: torch.device) -> int:
    """The compute capability of a device as major * 10 + minor, `DEFAULT_ARCH` for what is not a GPU."""
    if device.type != "cuda":
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def parameters(kernel: str, rows: int, device: torch.device) -> Launch:
    """The table's entry for a kernel over ``rows`` rows on ``device``."""
    arch = arch_of(device)
    archs = TABLE[kernel]
    entries = archs[max((known for known in archs if known <= arch), default=min(archs))]
    return next(launch for limit, launch in entries if rows <= limit)


def elements_of(channels: int, patch: int) -> int:
    """The latent elements of a patch, padded to what a matrix product takes."""
    return max(SMALLEST_DOT, int(triton.next_power_of_2(channels * patch * patch)))


def columns(launch: Launch, dtype: torch.dtype, elements: int) -> int:
    """Channels at a time of a kernel that multiplies by patches: fewer where they are wider or patches larger.

    The table's are for 2-byte channels and the smallest patches.
    """
    return max(SMALLEST_DOT, launch.cols * 2 * SMALLEST_DOT // (dtype.itemsize * elements))


def on(x: Tensor) -> AbstractContextManager[object]:
    """The device that ``x`` is on as the current one: Triton launches on the current device and stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
