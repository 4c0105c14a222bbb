"""The gated sum over all cache slots, for one or several coming ATTN_MLP steps.

    sums_j <- base + sum_k gate_k(step + j) * slot_k

An ATTN_MLP step runs no branch, so that no layer waits for another: all it needs of the layers is this sum, which does
not depend on x. One pass over the slots makes the sums of up to three steps; a program owns a tile of rows and channels
and streams the slots through it, which keeps many loads in flight.
"""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import checks, launch
from ebcache_fast.kernels._order import advance, begin
from ebcache_fast.kernels._stream import load, vector_offsets
from ebcache_fast.ops.operands import StepIndex

MAX_STEPS = 3


@triton.jit
def _sum_kernel(
    slots, gates, at, strides, base, sums, K, M, T, D,
    STEPS: tl.constexpr, BASE: tl.constexpr, launch_pdl: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin(launch_pdl)
    advance(at)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    keep_row = row < M
    keep = keep_row[:, None] & (col < D)[None, :]
    slot_size = tl.cast(M, tl.int64) * D  # all slots together pass 2**31 elements
    offsets = row.to(tl.int64)[:, None] * D + col[None, :]
    # The gates lie as the slots do, (ROWS, COLS): a broadcast row would put a barrier into every turn of the loop.
    gate_offsets = vector_offsets(row // T, keep_row, at, strides)[:, None] + col[None, :]
    step_stride, slot_stride = strides[0], strides[2]

    first = tl.zeros((ROWS, COLS), tl.float32)
    if BASE:
        first = load(base, offsets, keep)
    second = first
    third = first
    for k in tl.range(0, K, num_stages=STAGES):
        slot = load(slots + k * slot_size, offsets, keep)
        gate = gates + k * slot_stride
        first += load(gate, gate_offsets, keep) * slot
        if STEPS > 1:
            second += load(gate + step_stride, gate_offsets, keep) * slot
        if STEPS > 2:
            third += load(gate + 2 * step_stride, gate_offsets, keep) * slot

    tl.store(sums + offsets, first, mask=keep)
    if STEPS > 1:
        tl.store(sums + slot_size + offsets, second, mask=keep)
    if STEPS > 2:
        tl.store(sums + 2 * slot_size + offsets, third, mask=keep)


def gated_sum(
    slots: Tensor, gates: Tensor, at: StepIndex, base: Tensor | None, sums: Tensor, *, pdl: bool = False
) -> None:
    """Write the gated sums of ``len(sums)`` coming steps; see `ebcache_fast.ops.reference.gated_sum`.

    slots (K, R, T, D), gates (S, K, U, D), base (R, T, D) or None, sums (n, R, T, D). Raises InputError for more than
    three steps at once and what `checks` refuses.
    """
    steps = len(sums)
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"{steps} steps in one pass are outside [1, {MAX_STEPS}]; split the run")
    if slots.ndim != 4 or gates.ndim != 4 or gates.shape[1] != len(slots) or not len(slots):
        raise InputError(
            f"slots {tuple(slots.shape)} and gates {tuple(gates.shape)} do not fit; they must be (slots, rows, tokens, "
            "channels) and (steps, slots, conditions, channels)"
        )
    rows, tokens, width = checks.stream(sums[0], *([] if base is None else [base]))
    checks.alike(slots, sums, (len(slots), rows, tokens, width))
    checks.alike(sums, sums, (steps, rows, tokens, width))
    step_stride, condition_stride = checks.vectors(sums[0], gates[:, 0])
    checks.at(sums[0], at)
    entry = launch.parameters("gated_sum", rows * tokens, sums.device)
    config = launch.fit(entry, sums.device, partial(_shared, steps, sums.itemsize))
    grid = (triton.cdiv(rows * tokens, config.rows), triton.cdiv(width, config.cols))
    with launch.on(sums):
        _sum_kernel[grid](
            slots,
            gates,
            at,
            (step_stride, condition_stride, gates.stride(1)),
            base,
            sums,
            len(slots),
            rows * tokens,
            tokens,
            width,
            STEPS=steps,
            BASE=base is not None,
            launch_pdl=pdl,
            ROWS=config.rows,
            COLS=config.cols,
            STAGES=config.stages,
            num_warps=config.warps,
            **launch.OPTIONS,
        )


def _shared(steps: int, itemsize: int, config: launch.Launch) -> int:
    """Most bytes of shared memory: a tile of a slot and of each step's gates, for each stage but the one at hand."""
    return (config.stages - 1) * config.rows * config.cols * itemsize * (1 + steps) + launch.ROOM
