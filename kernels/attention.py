"""Self-attention from packed projections, read in place.

    out = softmax(q @ k.T / sqrt(head_dim)) @ v,   for each batch row and head

qkv (R, T, 3 * D) as (3, heads, head_dim), out (R, T, D). A program makes one head's output for a tile of queries, and
walks over the keys with the running maximum and sum of the online softmax (Milakov and Gimelshein, arXiv 1805.02867;
Dao et al., arXiv 2205.14135) in float32, in powers of 2. A head's features are cut into a main part and a rest (72 = 64
+ 8 of 16), because one masked tile of 128 would nearly double the work. Addresses are built from the head dimension,
which is known when the kernel is compiled, so that their alignment is known too.
"""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import checks, launch

MAX_HEAD = 128  # beyond it tiles leave registers
SMALLEST_DOT = 16
FLOAT32 = launch.Launch(32, 16, 8, 2)  # each float32 operand is three tf32 ones in registers, so that tiles are small


@triton.jit
def _attention_kernel(
    qkv,
    out,
    T,
    heads,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    SCALE: tl.constexpr = 1.4426950408889634 * HEAD**-0.5  # log2(e) / sqrt(head_dim)
    D = heads * HEAD
    step = 3 * D  # from a token to the next in qkv
    tiles = tl.cdiv(T, QUERIES)
    program = tl.program_id(0)
    first = program % tiles * QUERIES
    head = program // tiles % heads * HEAD
    token = (program // tiles // heads).to(tl.int64) * T  # the batch row's first

    queries, keys = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    col = tl.arange(0, MAIN)
    keep_q, keep_col = (queries < T - first)[:, None], col < HEAD
    q_at = qkv + (token + first) * step + head
    k_at = qkv + token * step + head + D
    main = keys[:, None] * step + col
    q = tl.load(q_at + queries[:, None] * step + col, keep_q & keep_col, other=0.0)  # (QUERIES, MAIN)
    total = tl.zeros((QUERIES, MAIN), tl.float32)
    if REST > 0:
        rest_col = MAIN + tl.arange(0, REST)
        keep_rest = rest_col < HEAD
        rest = keys[:, None] * step + rest_col
        rest_q = tl.load(q_at + queries[:, None] * step + rest_col, keep_q & keep_rest, other=0.0)  # (QUERIES, REST)
        rest_total = tl.zeros((QUERIES, REST), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((QUERIES,), tl.float32)

    for key in range(0, T, KEYS):
        keep = keys < T - key
        k = tl.load(k_at + main, keep[:, None] & keep_col, other=0.0)  # (KEYS, MAIN)
        scores = tl.dot(q, k.T, input_precision="tf32x3")  # (QUERIES, KEYS)
        if REST > 0:
            rest_k = tl.load(k_at + rest, keep[:, None] & keep_rest, other=0.0)  # (KEYS, REST)
            scores = tl.dot(rest_q, rest_k.T, scores, input_precision="tf32x3")
        scores = tl.where(keep, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * SCALE)
        weights = tl.exp2(scores * SCALE - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top = new_top
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
        v = tl.load(k_at + D + main, keep[:, None] & keep_col, other=0.0)  # (KEYS, MAIN)
        weights = weights.to(v.dtype)
        total = tl.dot(weights, v, total * shrink[:, None], input_precision="tf32x3")
        if REST > 0:
            rest_v = tl.load(k_at + D + rest, keep[:, None] & keep_rest, other=0.0)  # (KEYS, REST)
            rest_total = tl.dot(weights, rest_v, rest_total * shrink[:, None], input_precision="tf32x3")
        k_at += KEYS * step

    out_at = out + (token + first) * D + head + queries[:, None] * D
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
    head = D // heads
    main, rest = _cut(head)
    entry = FLOAT32 if out.itemsize == 4 else launch.parameters("attention", R * T, out.device)
    chosen = launch.fit(entry, out.device, partial(_shared, (main + rest) * out.itemsize))
    with launch.on(out):
        _attention_kernel[(triton.cdiv(T, chosen.rows) * heads * R,)](
            qkv,
            out,
            T,
            heads,
            HEAD=head,
            MAIN=main,
            REST=rest,
            QUERIES=chosen.rows,
            KEYS=chosen.cols,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            **launch.OPTIONS,
        )


def _shared(row: int, chosen: launch.Launch) -> int:
    """Most bytes of shared memory: a tile of queries, and for each stage one of keys and one of values."""
    return (chosen.rows + 2 * chosen.stages * chosen.cols) * row + launch.ROOM


def _cut(head: int) -> tuple[int, int]:
    """A head's features as a main and a rest of a power of two each, the rest 0 where that saves nothing."""
    whole = max(SMALLEST_DOT, triton.next_power_of_2(head))
    half = whole // 2
    rest = max(SMALLEST_DOT, triton.next_power_of_2(head - half))
    return (half, rest) if half + rest < whole else (whole, 0)
