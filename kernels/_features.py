"""Head's features of a tile of tokens, guidance on them, and the sampler's step.

Where a tile's channels come from is a function of its own, ``tile_of(source, col, D)``: the residual stream in the
head, latents and a gated sum in a run of steps. It is asked twice for each chunk of channels, first for the statistics
of the LayerNorm, then for the features, because a row of tokens is too wide to keep.
"""

import triton
import triton.language as tl

from ebcache_fast.kernels._stream import load, merge_statistics, modulate

SMALLEST_DOT = tl.constexpr(16)  # rows, columns and depth of the smallest matrix product


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

    # The head's rows go place by place in the patch: there the channels of eps, then those of the variance.
    keep_element = element < C * P * P
    row = element % (P * P) * OUT + element // (P * P)
    # A product of 16 features would be made by every warp alike: slices of the channels give each warp its own.
    SLICES: tl.constexpr = COLS // SMALLEST_DOT if E == SMALLEST_DOT else 1
    eps = tl.zeros((SLICES, ROWS, E), tl.float32)
    variance = tl.zeros((SLICES, ROWS, E), tl.float32)
    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        keep = (col < D)[None, :]
        tile = tile_of(source, col, D)
        normed = tl.where(keep, (tile - mean[:, None]) * scale[:, None], 0.0)
        inputs = modulate(normed, norm, norm_start, col[None, :], keep).to(linear.weight.dtype.element_ty)
        where = row[:, None] * D + col[None, :]
        keep = keep_element[:, None] & keep
        eps = _add_products(eps, inputs, tl.load(linear.weight + where, mask=keep, other=0.0))
        if VARIANCE:
            weight = tl.load(linear.weight + C * D + where, mask=keep, other=0.0)  # (E, COLS)
            variance = _add_products(variance, inputs, weight)
    eps = tl.sum(eps, axis=0) + load(linear.bias, row, keep_element)[None, :]
    variance = tl.sum(variance, axis=0)
    if VARIANCE:
        variance += load(linear.bias, row + C, keep_element)[None, :]
    return eps, variance


@triton.jit
def _add_products(totals, inputs, weight):
    """Add ``inputs @ weight.T`` to totals (slices, ROWS, E), whose sum over the slices counts."""
    SLICES: tl.constexpr = totals.shape[0]
    if SLICES == 1:
        return totals + tl.dot(inputs, weight.T, input_precision="tf32x3")[None]
    depth: tl.constexpr = inputs.shape[1] // SLICES
    left = inputs.reshape(inputs.shape[0], SLICES, depth).permute(1, 0, 2)
    right = weight.reshape(weight.shape[0], SLICES, depth).permute(1, 2, 0)
    return tl.dot(left, right, totals, input_precision="tf32x3")


@triton.jit
def guided(cond, uncond, settings, element, P: tl.constexpr, GUIDED: tl.constexpr):
    """Classifier-free guidance on the first GUIDED channels; all others stay the conditional ones."""
    mixed = uncond + tl.load(settings) * (cond - uncond)
    return tl.where((element < GUIDED * P * P)[None, :], mixed, cond)


@triton.jit
def add_row(
    eps, variance, row_eps, row_variance, copy, copies, settings, element, P: tl.constexpr, GUIDED: tl.constexpr
):
    """`guided`, and the conditional variance, row by row: the conditional one (copy 0) comes first.

    The rows of a sample are a loop and not the same code twice, because registers would not suffice.
    """
    scale = tl.where(copies == 2, tl.load(settings), 1.0)
    share = tl.where(copy == 0, scale, 1.0 - scale)
    unguided = tl.where(copy == 0, row_eps, eps)
    eps = tl.where((element < GUIDED * P * P)[None, :], eps + share * row_eps, unguided)
    return eps, tl.where(copy == 0, row_variance, variance)


@triton.jit
def sampler_update(x, eps, variance, noise, row, VARIANCE: tl.constexpr, NOISE: tl.constexpr):
    """``cx * x + ce * eps + (noise_on * exp(log_var / 2) + sigma) * noise``; row points at the six coefficients."""
    x = tl.load(row) * x + tl.load(row + 1) * eps
    if NOISE:
        log_var = tl.load(row + 2)
        if VARIANCE:
            log_var += (variance + 1.0) * 0.5 * (tl.load(row + 3) - log_var)
        deviation = tl.load(row + 4) * tl.exp(0.5 * log_var) + tl.load(row + 5)
        x += deviation * noise
    return x


@triton.jit
def remember(x, eps, row):
    """``px * x + pe * eps``, what the next step adds ``cp`` times; row points at the nine coefficients."""
    return tl.load(row + 7) * x + tl.load(row + 8) * eps
