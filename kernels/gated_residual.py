"""Gated residual, and with it the next branch's modulated LayerNorm, as it is or in float8.

    h <- h + sum_k gate_k * branch_k                                                          k up to 2
    u <- (h - mean(h)) / sqrt(var(h) + eps) * (1 + scale) + shift                             over the D channels
    scale8 <- max |u| / 448,   u8 <- u / scale8                                               e4m3, a scale a token

A branch is a fresh output or lies in the cache, ungated: with a cached attention output this is the cached-attention
substitution. A program holds whole rows, cut into the largest power of two that fits in D and a masked rest (1152 =
1024 + 128), because one masked tile of 2048 would need twice the registers. Float8 is made of u before it is rounded to
anything else: for one reduction more of what the program holds, half the bytes are written. A NaN stays one in float8,
and with it whatever that row is multiplied by; it has no part in the scale.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import checks, launch
from ebcache_fast.kernels._order import advance, begin
from ebcache_fast.kernels._stream import modulate, residual, vector_offsets
from ebcache_fast.ops.operands import Norm, Quantised, StepIndex

MAX_BRANCHES = 2
LARGEST_FLOAT8 = tl.constexpr(448.0)  # of e4m3
SMALLEST_ROW = tl.constexpr(1e-12)  # what counts as the largest of a row of zeros


@triton.jit
def _residual_kernel(
    h, branches, gates, at, strides, M, T, D, launch_pdl: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    begin(launch_pdl)
    advance(at)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    keep_row = row < M
    keep = keep_row[:, None] & (col < D)[None, :]
    offsets = row.to(tl.int64)[:, None] * D + col[None, :]
    gate_offsets = vector_offsets(row // T, keep_row, at, strides)[:, None] + col[None, :]
    total = residual(h, branches, gates, offsets, gate_offsets, keep)
    tl.store(h + offsets, total, mask=keep)


@triton.jit
def _norm_kernel(
    h, branches, gates, norm, at, strides, u, scales, M, T, D,
    launch_pdl: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    begin(launch_pdl)
    advance(at)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64)[:, None] * D
    keep_row = row < M
    vectors = vector_offsets(row // T, keep_row, at, strides)[:, None]

    col = tl.arange(0, MAIN)[None, :]
    keep = keep_row[:, None] & (col < D)
    main = residual(h, branches, gates, start + col, vectors + col, keep)  # (ROWS, MAIN)
    mean = tl.sum(main, axis=1)
    if REST > 0:
        rest_col = MAIN + tl.arange(0, REST)[None, :]
        rest_keep = keep_row[:, None] & (rest_col < D)
        rest = residual(h, branches, gates, start + rest_col, vectors + rest_col, rest_keep)  # (ROWS, REST)
        mean += tl.sum(rest, axis=1)
    mean = tl.div_rn(mean, tl.cast(D, tl.float32))  # what is left over of a large mean is no variance

    if len(branches):
        tl.store(h + start + col, main, mask=keep)
    main = tl.where(keep, main - mean[:, None], 0.0)
    variance = tl.sum(main * main, axis=1)
    if REST > 0:
        if len(branches):
            tl.store(h + start + rest_col, rest, mask=rest_keep)
        rest = tl.where(rest_keep, rest - mean[:, None], 0.0)
        variance += tl.sum(rest * rest, axis=1)
    scale = tl.rsqrt(variance / D + norm.eps)[:, None]

    main = modulate(main * scale, norm, vectors, col, keep)  # 0 where it is not kept
    if scales is None:
        tl.store(u + start + col, main, mask=keep)
    if REST > 0:
        rest = modulate(rest * scale, norm, vectors, rest_col, rest_keep)
        if scales is None:
            tl.store(u + start + rest_col, rest, mask=rest_keep)
    if scales is not None:
        largest = tl.maximum(tl.max(tl.abs(main), axis=1), SMALLEST_ROW)
        if REST > 0:
            largest = tl.maximum(tl.max(tl.abs(rest), axis=1), largest)
        scale8 = largest / LARGEST_FLOAT8
        tl.store(scales + row, scale8, mask=keep_row)
        factor = (1.0 / scale8)[:, None]
        tl.store(u + start + col, main * factor, mask=keep)
        if REST > 0:
            tl.store(u + start + rest_col, rest * factor, mask=rest_keep)


def gated_residual(
    h: Tensor, branches: Sequence[Tensor], gates: Sequence[Tensor], at: StepIndex, *, pdl: bool = False
) -> None:
    """``h += sum_k gates[k] * branches[k]`` in place; see `ebcache_fast.ops.reference.gated_residual`.

    Raises InputError for no branch, more than two, and what `checks` refuses.
    """
    if not branches:
        raise InputError("there is no branch to add to the stream; pass one or two")
    rows, tokens, width = checks.stream(h, *branches)
    checks.branch_count(branches, gates, MAX_BRANCHES)
    strides = checks.vectors(h, *gates)
    checks.at(h, at)
    entry = launch.parameters("gated_residual", rows * tokens, h.device)
    config = launch.fit(entry, h.device, lambda _: launch.ROOM)
    cols = min(1024, triton.next_power_of_2(width))
    grid = (triton.cdiv(rows * tokens, config.rows), triton.cdiv(width, cols))
    with launch.on(h):
        _residual_kernel[grid](
            h,
            tuple(branches),
            tuple(gates),
            at,
            strides,
            rows * tokens,
            tokens,
            width,
            launch_pdl=pdl,
            ROWS=config.rows,
            COLS=cols,
            num_warps=config.warps,
            **launch.OPTIONS,
        )


def gated_residual_norm_modulate(
    h: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    norm: Norm,
    at: StepIndex,
    u: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """`gated_residual` on h, its modulated LayerNorm into u; see the reference of this name.

    Raises InputError for more than two branches and what `checks` refuses.
    """
    checks.alike(u, h, h.shape)
    _launch_norm(h, branches, gates, norm, at, u, None, pdl)


def gated_residual_norm_quantise(
    h: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    norm: Norm,
    at: StepIndex,
    u: Quantised,
    *,
    pdl: bool = False,
) -> None:
    """`gated_residual_norm_modulate` into float8; see the reference of this name. From compute capability 8.9.

    Raises InputError as that does.
    """
    checks.quantised(u, h)
    _launch_norm(h, branches, gates, norm, at, u.values, u.scales, pdl)


def _launch_norm(
    h: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    norm: Norm,
    at: StepIndex,
    u: Tensor,
    scales: Tensor | None,
    pdl: bool,
) -> None:
    """Launch the kernel; without scales u is written as it is."""
    norm = checks.norm_weights(norm)
    rows, tokens, width = checks.stream(h, *branches)
    checks.branch_count(branches, gates, MAX_BRANCHES)
    strides = checks.norm(h, norm, *gates)
    checks.at(h, at)
    main = max(16, 1 << (width.bit_length() - 1))
    rest = triton.next_power_of_2(width - main) if width > main else 0
    config = launch.fit_rows(launch.parameters("gated_residual", rows * tokens, h.device), main + rest, h.device)
    with launch.on(h):
        _norm_kernel[(triton.cdiv(rows * tokens, config.rows),)](
            h,
            tuple(branches),
            tuple(gates),
            norm,
            at,
            strides,
            u,
            scales,
            rows * tokens,
            tokens,
            width,
            launch_pdl=pdl,
            ROWS=config.rows,
            MAIN=main,
            REST=rest,
            num_warps=config.warps,
            **launch.OPTIONS,
        )
