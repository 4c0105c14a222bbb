"""Launch parameters of each kernel: a fixed table by rows and architecture, found offline by bench/tune.py.

Nothing is tuned at run time: a captured graph must not depend on what else the card did while it was made. What a card
does not have is found before the launch: every launcher knows an upper bound of the shared memory that its kernel takes
(held against the compiler by tests/test_kernel_compiles.py), and an entry gives up stages until that fits the card.

Every launcher of a fused operation has a keyword ``pdl``: launch while the kernel before still runs (programmatic
dependent launch, from compute capability 9.0), and wait for its results inside; see `_order`. To the kernels it is
``launch_pdl``, the name of Triton's own option, so that one argument is read by both.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

SMALLEST_DOT = 16  # rows, columns and depth of the smallest matrix product
DEFAULT_ARCH = 90  # of tensors that are on no GPU: what the interpreter and offline compiles run
# Of every launch: a * b + c is one FMA, rounded once, whatever Triton's default or the environment says.
OPTIONS: Mapping[str, bool] = MappingProxyType({"enable_fp_fusion": True})


class Launch(NamedTuple):
    """A program's share of the work, and its resources."""

    rows: int  # rows of the residual stream, or tokens, a program
    cols: int  # channels a program, or a step of its loop
    warps: int
    stages: int = 1  # loads in flight, of kernels that loop over cols


class Arch(NamedTuple):
    """Traits of a compute capability that launches depend on."""

    like: int  # whose entries it takes, or the nearest older ones: products by mma (80), wgmma (90) or tcgen05 (100)
    shared: int  # bytes of shared memory that it grants a block


# Source: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications".
ARCHS: Mapping[int, Arch] = {
    80: Arch(80, 163 * 1024),
    86: Arch(80, 99 * 1024),
    87: Arch(80, 163 * 1024),
    89: Arch(80, 99 * 1024),
    90: Arch(90, 227 * 1024),
    100: Arch(100, 227 * 1024),
    103: Arch(100, 227 * 1024),
    120: Arch(80, 99 * 1024),
    121: Arch(80, 99 * 1024),
}
ANY_OTHER = Arch(80, 99 * 1024)  # the least that any has from 8.0 on
ROOM = 1024  # bytes of shared memory for barriers and the like, in every bound
MOST_WARPS = 8  # so many can have all 255 registers that a thread may have
MOST_VALUES = 64  # of whole rows in a thread's registers: beyond, some spill
WIDEST_EMBEDDED, WIDEST_HEAD = 512, 1024  # bytes of a patch in the model's dtype: beyond, registers spill

# By kernel, then by architecture, then by the number of rows up to which an entry holds, in rising order.
Entries = tuple[tuple[float, Launch], ...]
ALL = float("inf")
TABLE: Mapping[str, Mapping[int, Entries]] = {
    "gated_residual": {80: ((4096, Launch(rows=1, cols=0, warps=4)), (ALL, Launch(rows=4, cols=0, warps=8)))},
    "tokens": {80: ((4096, Launch(rows=1, cols=0, warps=4)), (ALL, Launch(rows=4, cols=0, warps=8)))},
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
    # Smaller tiles: the band's mask takes registers, and less of them lies outside of it.
    "window_attention": {80: ((ALL, Launch(64, 32, 4, 2)),), 90: ((ALL, Launch(64, 64, 4, 2)),)},
}


def arch_of(device: torch.device) -> int:
    """The compute capability of a device as major * 10 + minor, `DEFAULT_ARCH` for what is not a GPU."""
    if device.type != "cuda":
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def parameters(kernel: str, rows: int, device: torch.device) -> Launch:
    """The table's entry for a kernel over ``rows`` rows on ``device``."""
    like, archs = _arch(device).like, TABLE[kernel]
    entries = archs[max((known for known in archs if known <= like), default=min(archs))]
    return next(launch for limit, launch in entries if rows <= limit)


def fit(launch: Launch, device: torch.device, shared: Callable[[Launch], int]) -> Launch:
    """A launch with as many stages as shared memory holds: ``shared`` bounds the bytes that it takes.

    Raises OutOfResources, as Triton would at the launch, where one stage is too much.
    """
    limit = _arch(device).shared
    while launch.stages > 1 and shared(launch) > limit:
        launch = launch._replace(stages=launch.stages - 1)
    if (needed := shared(launch)) > limit:
        raise OutOfResources(needed, limit, "shared memory")
    return launch


def fit_rows(launch: Launch, width: int, device: torch.device) -> Launch:
    """A launch whose programs hold whole rows of ``width`` channels, with as many rows as registers hold.

    Raises OutOfResources where one row is too much.
    """
    while launch.rows > 1 and launch.rows * width > MOST_VALUES * 32 * launch.warps:
        launch = launch._replace(rows=launch.rows // 2)
    if launch.rows * width > MOST_VALUES * 32 * launch.warps:
        launch = launch._replace(warps=MOST_WARPS)
    if (needed := launch.rows * width) > (limit := MOST_VALUES * 32 * MOST_WARPS):
        raise OutOfResources(needed, limit, "registers for whole rows")
    return fit(launch, device, lambda launch: launch.rows * width * 4 + ROOM)


def _arch(device: torch.device) -> Arch:
    return ARCHS.get(arch_of(device), ANY_OTHER)


def elements_of(channels: int, patch: int) -> int:
    """The latent elements of a patch, padded to what a matrix product takes."""
    return max(SMALLEST_DOT, int(triton.next_power_of_2(channels * patch * patch)))


def fit_patches(launch: Launch, x: Tensor, itemsize: int, elements: int, *, embeds: bool, heads: bool) -> Launch:
    """A launch of a kernel that multiplies by patches of ``elements``: fewer channels at a time where those are larger.

    The table's are for 2-byte channels and the smallest patches. Each warp of an embedding holds the patches of all its
    rows, of float32 in two parts; a head holds the features of all its rows twice. Raises OutOfResources where that is
    too much for registers or shared memory.
    """
    cols = max(SMALLEST_DOT, launch.cols * 2 * SMALLEST_DOT // (itemsize * elements))
    patch = elements * itemsize
    if patch > (limit := WIDEST_EMBEDDED if embeds else WIDEST_HEAD):
        raise OutOfResources(patch, limit, "registers for a patch, in bytes")
    warps = MOST_WARPS if heads and patch > WIDEST_EMBEDDED // 2 else launch.warps
    tile, rows, weight = launch.rows * cols * itemsize, launch.rows * patch, cols * patch

    def shared(_: Launch) -> int:
        of_embedding, of_head = 4 * rows + 4 * tile + 4 * ROOM, 5 * weight + 8 * tile + 7 * ROOM
        return embeds * of_embedding + heads * of_head + ROOM

    return fit(launch._replace(cols=cols, warps=warps), x.device, shared)


def on(x: Tensor) -> AbstractContextManager[object]:
    """The device that ``x`` is on as the current one: Triton launches on the current device and stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
