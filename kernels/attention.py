"""Self-attention: from packed projections, read in place, or of each token to those near it.

    out = softmax(q @ k.T / sqrt(head_dim)) @ v,   for each batch row and head;   in a window of w, |i - j| <= w // 2

A program makes one head's output for a tile of queries, and walks over the keys (those that any of its queries sees)
with the running maximum and sum of the online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv
2205.14135) in float32, in powers of 2. A head's features are cut into a main part and a rest (72 = 64 + 8 of 16),
because one masked tile of 128 would nearly double the work. q, k and v (R, heads, T, head_dim) lie alike, out as it
may, features side by side. What divides all strides is known when the kernel is compiled, so that addresses' alignment
is known too.
"""

import math
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import checks, launch

MAX_HEAD = 128  # beyond it tiles leave registers
SMALLEST_DOT = 16
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
FLOAT32 = launch.Launch(32, 16, 8, 2)  # each float32 operand is three tf32 ones in registers, so that tiles are small


@triton.jit
def _first_feature(row, head, token, strides, ALIGN: tl.constexpr):
    """Offset of the first of a token's features of a head; strides of rows, heads and tokens."""
    of_row = tl.cast(row, tl.int64) * (strides[0] // ALIGN * ALIGN)
    of_head = tl.cast(head, tl.int64) * (strides[1] // ALIGN * ALIGN)
    return of_row + of_head + tl.cast(token, tl.int64) * (strides[2] // ALIGN * ALIGN)


@triton.jit
def _attention_kernel(
    q, k, v, out, strides, out_strides, T, heads, reach,
    HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    SCALE: tl.constexpr = 1.4426950408889634 * HEAD**-0.5  # log2(e) / sqrt(head_dim)
    tiles = tl.cdiv(T, QUERIES)
    program = tl.program_id(0)
    first = program % tiles * QUERIES
    head = program // tiles % heads
    row = program // tiles // heads
    start, end = 0, T  # of the keys
    if WINDOW:
        start, end = tl.maximum(first - reach, 0), tl.minimum(first + QUERIES + reach, T)

    queries, keys = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    col = tl.arange(0, MAIN)
    keep_q, keep_col = (queries < T - first)[:, None], col < HEAD
    step = strides[2] // ALIGN * ALIGN  # from a token to the next
    q_at = q + _first_feature(row, head, first, strides, ALIGN)
    k_at = k + _first_feature(row, head, start, strides, ALIGN)
    v_at = v + _first_feature(row, head, start, strides, ALIGN)
    main = keys[:, None] * step + col
    q_main = tl.load(q_at + queries[:, None] * step + col, keep_q & keep_col, other=0.0)  # (QUERIES, MAIN)
    total = tl.zeros((QUERIES, MAIN), tl.float32)
    if REST > 0:
        rest_col = MAIN + tl.arange(0, REST)
        keep_rest = rest_col < HEAD
        rest = keys[:, None] * step + rest_col
        q_rest = tl.load(q_at + queries[:, None] * step + rest_col, keep_q & keep_rest, other=0.0)  # (QUERIES, REST)
        rest_total = tl.zeros((QUERIES, REST), tl.float32)
    top = tl.full((QUERIES,), LOWEST, tl.float32)  # in a window, a query may see none of the first keys
    weight_sum = tl.zeros((QUERIES,), tl.float32)

    for key in range(start, end, KEYS):
        keep = keys < end - key
        k_main = tl.load(k_at + main, keep[:, None] & keep_col, other=0.0)  # (KEYS, MAIN)
        scores = tl.dot(q_main, k_main.T, input_precision="tf32x3")  # (QUERIES, KEYS)
        if REST > 0:
            k_rest = tl.load(k_at + rest, keep[:, None] & keep_rest, other=0.0)  # (KEYS, REST)
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision="tf32x3")
        seen = keep
        if WINDOW:
            seen = keep & (tl.abs((key - first + keys) - queries[:, None]) <= reach)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * SCALE)
        weights = tl.exp2(scores * SCALE - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top = new_top
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
        v_main = tl.load(v_at + main, keep[:, None] & keep_col, other=0.0)  # (KEYS, MAIN)
        weights = weights.to(v_main.dtype)
        total = tl.dot(weights, v_main, total * shrink[:, None], input_precision="tf32x3")
        if REST > 0:
            v_rest = tl.load(v_at + rest, keep[:, None] & keep_rest, other=0.0)  # (KEYS, REST)
            rest_total = tl.dot(weights, v_rest, rest_total * shrink[:, None], input_precision="tf32x3")
        k_at += KEYS * step
        v_at += KEYS * step

    out_at = out + _first_feature(row, head, first, out_strides, ALIGN)
    out_at += queries[:, None] * (out_strides[2] // ALIGN * ALIGN)
    tl.store(out_at + col, total / weight_sum[:, None], keep_q & keep_col)
    if REST > 0:
        tl.store(out_at + rest_col, rest_total / weight_sum[:, None], keep_q & keep_rest)


def attention(qkv: Tensor, heads: int, out: Tensor) -> None:
    """Self-attention from packed projections qkv (R, T, 3 * D), as (3, heads, D / heads) -> out (R, T, D).

    Raises InputError for heads that do not divide D or are wider than 128, tensors that do not fit or are not
    contiguous, and dtypes other than float32, float16 and bfloat16 or not the same for both.
    """
    R, T, D = checks.stream(out)
    checks.alike(qkv, out, (R, T, 3 * D))
    if heads < 1 or D % heads or D // heads > MAX_HEAD:
        raise InputError(
            f"{heads} heads do not cut {D} channels into heads of 1 to {MAX_HEAD}; leave this to torch's attention"
        )
    q, k, v = qkv.view(R, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)  # (R, heads, T, D / heads)
    _launch("attention", q, k, v, None, out.view(R, T, heads, -1).transpose(1, 2))


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, out: Tensor) -> None:
    """Attention of each token i to the tokens j with ``|i - j| <= window // 2``; see the reference of this name.

    q, k, v and out (N, heads, T, d). Of q, k and v that do not lie alike, copies are read. Raises InputError for a
    window below 1, heads wider than 128, tensors that do not fit, an out whose features are not side by side, and
    dtypes other than float32, float16 and bfloat16 or not the same for all.
    """
    checks.heads(out, q, k, v)
    if window < 1 or out.shape[3] > MAX_HEAD:
        raise InputError(
            f"a window of {window} tokens in heads of {out.shape[3]} has no kernel; it must be 1 or more tokens, and "
            f"heads of 1 to {MAX_HEAD}; leave wider ones to torch's attention"
        )
    if len({tensor.stride() for tensor in (q, k, v)}) != 1 or q.stride(3) != 1:
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
    _launch("window_attention", q, k, v, min(window // 2, out.shape[2]), out)


def _launch(name: str, q: Tensor, k: Tensor, v: Tensor, reach: int | None, out: Tensor) -> None:
    """Launch the kernel on (R, heads, T, head_dim), by this name's entry; a reach of None is that of all tokens."""
    R, heads, T, head = out.shape
    main, rest = _cut(head)
    entry = FLOAT32 if out.itemsize == 4 else launch.parameters(name, R * T, out.device)
    config = launch.fit(entry, out.device, partial(_shared, (main + rest) * out.itemsize))
    with launch.on(out):
        _attention_kernel[(triton.cdiv(T, config.rows) * heads * R,)](
            q,
            k,
            v,
            out,
            q.stride()[:3],
            out.stride()[:3],
            T,
            heads,
            reach or 0,
            HEAD=head,
            MAIN=main,
            REST=rest,
            ALIGN=math.gcd(16, *q.stride()[:3], *out.stride()[:3]),
            WINDOW=reach is not None,
            QUERIES=config.rows,
            KEYS=config.cols,
            num_warps=config.warps,
            num_stages=config.stages,
            **launch.OPTIONS,
        )


def _shared(row: int, config: launch.Launch) -> int:
    """Most bytes of shared memory: a tile of queries, and for each stage one of keys and one of values."""
    return (config.rows + 2 * config.stages * config.cols) * row + launch.ROOM


def _cut(head: int) -> tuple[int, int]:
    """A head's features as a main and a rest of a power of two each, the rest 0 where that saves nothing."""
    whole = max(SMALLEST_DOT, triton.next_power_of_2(head))
    half = whole // 2
    rest = max(SMALLEST_DOT, triton.next_power_of_2(head - half))
    return (half, rest) if half + rest < whole else (whole, 0)
