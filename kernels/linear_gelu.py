"""A linear map and GELU in one pass: the first half of the MLP.

    out = gelu(u @ weight.T + bias),   gelu(x) = x / 2 * (1 + tanh(z)) = x * sigmoid(2 * z),
    z = sqrt(2 / pi) * (x + 0.044715 * x^3)

u (M, D), weight (F, D), bias (F,), out (M, F). A program makes one tile of out and sums in float32. Where the card has
TMA and every row starts at a multiple of 16 bytes, tiles travel by descriptors that the host makes: like an address,
such a descriptor is an argument of the launch, so a captured graph keeps it, and no launch allocates. Everything else
goes by pointers.
"""

import math
from functools import partial

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import checks, launch
from ebcache_fast.ops.operands import Linear

TMA_ARCH = 90  # the first compute capability with TMA
LINE = 128  # bytes of each row that a program multiplies at a time: the widest that shared memory swizzles


@triton.jit
def _tile(M, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first row and column of this program's tile: eight tiles down, then one across, so that L2 serves u twice."""
    DOWN: tl.constexpr = 8
    group = tl.cdiv(F, COLS) * DOWN
    program = tl.program_id(0)
    first = program // group * DOWN
    down = tl.minimum(tl.cdiv(M, ROWS) - first, DOWN)
    return (first + program % down) * ROWS, program % group // down * COLS


@triton.jit
def _gelu(x):
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _pointer_kernel(
    u, weight, bias, out, M, D, F, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr
):
    D, F = D // ALIGN * ALIGN, F // ALIGN * ALIGN  # as they were, but now the compiler sees how rows are aligned
    row, col = _tile(M, F, ROWS, COLS)
    rows, cols, depth = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    keep_row, keep_col = row + rows < M, col + cols < F
    u += row.to(tl.int64) * D
    weight += col.to(tl.int64) * D
    total = tl.zeros((ROWS, COLS), tl.float32)
    for d in range(0, D, DEPTH):
        keep = d + depth < D
        left = tl.load(u + rows[:, None] * D + (d + depth), keep_row[:, None] & keep, other=0.0)  # (ROWS, DEPTH)
        right = tl.load(weight + cols[:, None] * D + (d + depth), keep_col[:, None] & keep, other=0.0)  # (COLS, DEPTH)
        total = tl.dot(left, right.T, total, input_precision="tf32x3")
    total += tl.load(bias + col + cols, keep_col)
    out += row.to(tl.int64) * F + col
    tl.store(out + rows[:, None] * F + cols, _gelu(total), keep_row[:, None] & keep_col)


@triton.jit
def _tma_kernel(u, weight, bias, out, M, D, F, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    row, col = _tile(M, F, ROWS, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for d in range(0, D, DEPTH):  # what lies outside of a tensor is read as 0, and not written
        total = tl.dot(u.load([row, d]), weight.load([col, d]).T, total, input_precision="tf32x3")
    cols = col + tl.arange(0, COLS)
    total += tl.load(bias + cols, cols < F)
    out.store([row, col], _gelu(total))


def linear_gelu(u: Tensor, linear: Linear, out: Tensor) -> None:
    """``gelu_tanh(u @ weight.T + bias)``: u (M, D) -> out (M, F), the first half of the MLP; see the reference.

    Raises InputError for shapes that do not fit, tensors that are not contiguous, and dtypes other than float32,
    float16 and bfloat16 or not the same for all.
    """
    if u.ndim != 2 or out.ndim != 2:
        raise InputError(
            f"u of shape {tuple(u.shape)} and out of {tuple(out.shape)} are not matrices; flatten the rows"
        )
    linear = checks.weights(linear)
    _, M, D = checks.stream(u[None])
    F = checks.stream(out[None])[2]
    for tensor, shape in ((linear.weight, (F, D)), (linear.bias, (F,)), (out, (M, F))):
        checks.alike(tensor, u, shape)
    has_tma = launch.arch_of(u.device) >= TMA_ARCH and all(map(_suits_tma, (u, linear.weight, out)))
    entry = launch.parameters("linear_gelu", M, u.device)
    config = launch.fit(entry, u.device, partial(_shared, u.itemsize, has_tma))
    rows, cols, depth = config.rows, config.cols * 2 // u.itemsize, LINE // u.itemsize  # fewer where they take more
    blocks = {"ROWS": rows, "COLS": cols, "DEPTH": depth}
    if has_tma:
        kernel = _tma_kernel
        operands = (
            _descriptor(u, rows, depth),
            _descriptor(linear.weight, cols, depth),
            linear.bias,
            _descriptor(out, rows, cols),
        )
    else:
        kernel = _pointer_kernel
        operands = (u, linear.weight, linear.bias, out)
        blocks["ALIGN"] = math.gcd(D, F, 16)
    with launch.on(u):
        kernel[(triton.cdiv(M, rows) * triton.cdiv(F, cols),)](
            *operands, M, D, F, **blocks, num_warps=config.warps, num_stages=config.stages, **launch.OPTIONS
        )


def _shared(itemsize: int, has_tma: bool, config: launch.Launch) -> int:
    """Most bytes of shared memory: a line of each row and column of the tile for each stage, and then the tile.

    By pointers the stage at hand is in registers already.
    """
    cols, stages = config.cols * 2 // itemsize, config.stages if has_tma else max(config.stages - 1, 1)
    return max(stages * (config.rows + cols) * LINE, config.rows * cols * 4) + launch.ROOM


def _suits_tma(matrix: Tensor) -> bool:
    """True if every row of a contiguous matrix starts at a multiple of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.shape[1] * matrix.itemsize % 16 == 0


def _descriptor(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A contiguous matrix as TMA sees it, in blocks of rows x cols."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [rows, cols])
