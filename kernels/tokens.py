"""Tokens of a stream, by their indices: gathered out of it, or scattered back into it.

    gather    out[r, i] = source[r, indices[r, i]]
    scatter   target[r, indices[r, i]] = source[r, i]

The stream is (R, T, D), indices (R, k) int32, the tokens of these (R, k, D). A program moves whole tokens, bit by bit,
and looks their indices up itself: torch would widen these to int64 in a launch of its own first. Indices within a row
are distinct, so that no two programs write the same token, and within [0, T), which nobody can check without waiting
for the device.
"""

import triton
import triton.language as tl
from torch import Tensor

from ebcache_fast.kernels import checks, launch
from ebcache_fast.kernels._order import begin


@triton.jit
def _move_kernel(
    source, indices, target, M, K, T, D,
    SCATTER: tl.constexpr, launch_pdl: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    begin(launch_pdl)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of all M = R * k chosen tokens
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    keep_row = row < M
    token = tl.load(indices + row, mask=keep_row)
    in_stream = ((row // K).to(tl.int64) * T + token)[:, None] * D + col[None, :]
    in_choice = row.to(tl.int64)[:, None] * D + col[None, :]
    keep = keep_row[:, None] & (col < D)[None, :]
    if SCATTER:
        tl.store(target + in_stream, tl.load(source + in_choice, mask=keep), mask=keep)
    else:
        tl.store(target + in_choice, tl.load(source + in_stream, mask=keep), mask=keep)


def gather_tokens(source: Tensor, indices: Tensor, out: Tensor, *, pdl: bool = False) -> None:
    """Write the chosen tokens of source (R, T, D) into out (R, k, D); see the reference of this name.

    Raises InputError for what `checks` refuses, and for more tokens than there are.
    """
    _move(source, indices, out, scatter=False, pdl=pdl)


def scatter_tokens(source: Tensor, indices: Tensor, target: Tensor, *, pdl: bool = False) -> None:
    """Write source (R, k, D) over the chosen tokens of target (R, T, D); see the reference of this name.

    Raises InputError as `gather_tokens` does.
    """
    _move(source, indices, target, scatter=True, pdl=pdl)


def _move(source: Tensor, indices: Tensor, target: Tensor, *, scatter: bool, pdl: bool) -> None:
    """Launch the kernel; the target of a scatter is the whole stream, the source of a gather."""
    stream, tokens = (target, source) if scatter else (source, target)
    R, T, D = checks.stream(stream)
    k = checks.choice(indices, stream)
    checks.alike(tokens, stream, (R, k, D))
    config = launch.fit(launch.parameters("tokens", R * k, stream.device), stream.device, lambda _: launch.ROOM)
    cols = min(1024, triton.next_power_of_2(D))
    with launch.on(stream):
        _move_kernel[(triton.cdiv(R * k, config.rows), triton.cdiv(D, cols))](
            source,
            indices,
            target,
            R * k,
            k,
            T,
            D,
            SCATTER=scatter,
            launch_pdl=pdl,
            ROWS=config.rows,
            COLS=cols,
            num_warps=config.warps,
            **launch.OPTIONS,
        )
