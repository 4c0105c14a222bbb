"""From tokens to noise: the head's features of a tile of tokens, guidance, and the sampler's step on them.

Where a tile's channels come from is a function of its own, ``tile_of(source, col, keep)``: the residual stream in the
head, latents and a gated sum in a run of steps. It is asked twice for each chunk of channels, first for the statistics
of the LayerNorm, then for the features, because a row of tokens is too wide to keep.
"""

import triton
import triton.language as tl

from ebcache_fast.kernels._stream import load, merge_statistics, modulate


@triton.jit
def features(
    source, tile_of: tl.constexpr, norm, norm_start, linear, element, D,
    C: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, VARIANCE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """eps and variance features, (ROWS, E) each, of a tile of tokens; without a variance its features are 0."""
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        tile = tile_of(source, col, D)
        mean, squares = merge_statistics(start, mean, squares, tile, (col < D)[None, :], tl.minimum(D - start, COLS))
    scale = tl.rsqrt(squares / D + norm.eps)

    # The head's rows: eps of a place in the patch, then its variance, channels last.
    keep_element = element < C * P * P
    row = element // C * OUT + element % C
    eps = tl.zeros((ROWS, E), tl.float32)
    variance = tl.zeros((ROWS, E), tl.float32)
    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        keep = (col < D)[None, :]
        tile = tile_of(source, col, D)
        normed = tl.where(keep, (tile - mean[:, None]) * scale[:, None], 0.0)
        inputs = modulate(normed, norm, norm_start + col[None, :], keep).to(linear.weight.dtype.element_ty)
        weight_offsets = row[None, :] * D + col[:, None]
        keep_weight = keep_element[None, :] & (col < D)[:, None]
        weight = tl.load(linear.weight + weight_offsets, mask=keep_weight, other=0.0)  # (COLS, E)
        eps = tl.dot(inputs, weight, eps, input_precision="tf32x3")
        if VARIANCE:
            weight = tl.load(linear.weight + C * D + weight_offsets, mask=keep_weight, other=0.0)
            variance = tl.dot(inputs, weight, variance, input_precision="tf32x3")
    eps += load(linear.bias, row, keep_element)[None, :]
    if VARIANCE:
        variance += load(linear.bias, row + C, keep_element)[None, :]
    return eps, variance


@triton.jit
def guided(cond, uncond, settings, element, C: tl.constexpr, GUIDED: tl.constexpr):
    """Classifier-free guidance on the first GUIDED channels; all others stay the conditional ones."""
    mixed = uncond + tl.load(settings).to(tl.float32) * (cond - uncond)
    return tl.where((element % C < GUIDED)[None, :], mixed, cond)


@triton.jit
def sampler_step(x, eps, variance, noise, row, VARIANCE: tl.constexpr, NOISE: tl.constexpr):
    """``cx * x + ce * eps + (noise_on * exp(log_var / 2) + sigma) * noise``; row points at the six coefficients."""
    x = tl.load(row) * x + tl.load(row + 1) * eps
    if NOISE:
        log_var = tl.load(row + 2)
        if VARIANCE:
            log_var += (variance + 1.0) * 0.5 * (tl.load(row + 3) - log_var)
        deviation = tl.load(row + 4) * tl.exp(0.5 * log_var) + tl.load(row + 5)
        x += deviation * noise
    return x
