"""Latents to tokens, and with it the first branch's modulated LayerNorm.

    h = patch @ weight + bias + position                               a linear map of each P x P patch of x
    u = (h - mean(h)) / sqrt(var(h) + eps) * (1 + scale) + shift       over the D channels

The same tokens go to both rows of a sample under guidance; only their modulation differs. A row of tokens is too wide
to keep, so that it is computed twice, once for its statistics: the map is a handful of multiplications a channel.
"""

import triton
import triton.language as tl
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import checks, launch
from ebcache_fast.kernels._order import advance, begin
from ebcache_fast.kernels._patches import embedded, pixels
from ebcache_fast.kernels._stream import merge_statistics, modulate, vector_offsets
from ebcache_fast.ops.operands import Norm, Patches, StepIndex


@triton.jit
def _embed_kernel(
    x, patches, h, size, B, T, D,
    C: tl.constexpr, P: tl.constexpr, COPIES: tl.constexpr, launch_pdl: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    begin(launch_pdl)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1)
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    latents, keep_token, element = _patches(x, sample, token, size, T, C, P, E)
    tile = embedded(latents, patches, token, col, D, keep_token, element, C, P)
    keep = keep_token[:, None] & (col < D)[None, :]
    for copy in tl.static_range(COPIES):
        row = (sample + copy * B).to(tl.int64) * T + token
        tl.store(h + row[:, None] * D + col[None, :], tile, mask=keep)


@triton.jit
def _embed_norm_kernel(
    x, patches, norm, at, strides, h, u, size, B, T, D,
    C: tl.constexpr, P: tl.constexpr, COPIES: tl.constexpr, launch_pdl: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    begin(launch_pdl)
    advance(at)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1)
    latents, keep_token, element = _patches(x, sample, token, size, T, C, P, E)
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        keep_col = (col < D)[None, :]
        tile = embedded(latents, patches, token, col, D, keep_token, element, C, P)
        mean, squares = merge_statistics(start, mean, squares, tile, keep_col, tl.minimum(D - start, COLS))
    scale = tl.rsqrt(squares / D + norm.eps)

    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        keep_col = (col < D)[None, :]
        keep = keep_token[:, None] & keep_col
        tile = embedded(latents, patches, token, col, D, keep_token, element, C, P)
        normed = (tile - mean[:, None]) * scale[:, None]
        for copy in tl.static_range(COPIES):
            row = (sample + copy * B).to(tl.int64) * T + token
            where = row[:, None] * D + col[None, :]
            vectors = vector_offsets(sample + copy * B, True, at, strides)
            tl.store(h + where, tile, mask=keep)
            tl.store(u + where, modulate(normed, norm, vectors, col[None, :], keep_col), mask=keep)


@triton.jit
def _patches(x, sample, token, size, T, C: tl.constexpr, P: tl.constexpr, E: tl.constexpr):
    """A tile's latents (ROWS, E), which of its tokens there are, and the elements of a patch."""
    element = tl.arange(0, E)
    keep = (token < T)[:, None] & (element < C * P * P)[None, :]
    latents = tl.load(x + pixels(sample, C, token, element, size, P), mask=keep, other=0.0)
    return latents, token < T, element


def embed(x: Tensor, patches: Patches, h: Tensor, *, pdl: bool = False) -> None:
    """Write the tokens of x (B, C, H, W) float32 into h (R, T, D); see `ebcache_fast.ops.reference.embed`.

    Raises InputError for what `checks` refuses.
    """
    _, tokens, width = checks.stream(h)
    patches = checks.weights(patches)
    patch, copies = _fit(x, patches, h)
    config, elements = _config(x, h, patch)
    grid = (triton.cdiv(tokens, config.rows), len(x), triton.cdiv(width, config.cols))
    with launch.on(h):
        _embed_kernel[grid](
            x,
            patches,
            h,
            tuple(x.shape[2:]),
            len(x),
            tokens,
            width,
            C=x.shape[1],
            P=patch,
            COPIES=copies,
            launch_pdl=pdl,
            ROWS=config.rows,
            COLS=config.cols,
            E=elements,
            num_warps=config.warps,
            **launch.OPTIONS,
        )


def embed_norm_modulate(
    x: Tensor, patches: Patches, norm: Norm, at: StepIndex, h: Tensor, u: Tensor, *, pdl: bool = False
) -> None:
    """`embed` into h, and the first branch's input into u; see the reference of this name.

    Raises InputError for what `checks` refuses.
    """
    _, tokens, width = checks.stream(h, u)
    patches, norm = checks.weights(patches), checks.norm_weights(norm)
    patch, copies = _fit(x, patches, h)
    strides = checks.norm(h, norm)
    checks.at(h, at)
    config, elements = _config(x, h, patch)
    with launch.on(h):
        _embed_norm_kernel[(triton.cdiv(tokens, config.rows), len(x))](
            x,
            patches,
            norm,
            at,
            strides,
            h,
            u,
            tuple(x.shape[2:]),
            len(x),
            tokens,
            width,
            C=x.shape[1],
            P=patch,
            COPIES=copies,
            launch_pdl=pdl,
            ROWS=config.rows,
            COLS=config.cols,
            E=elements,
            num_warps=config.warps,
            **launch.OPTIONS,
        )


def _config(x: Tensor, h: Tensor, patch: int) -> tuple[launch.Launch, int]:
    """Return the launch, and the padded elements of a patch."""
    elements = launch.elements_of(x.shape[1], patch)
    entry = launch.parameters("embed", len(h) * h.shape[1], h.device)
    return launch.fit_patches(entry, x, h.itemsize, elements, embeds=True, heads=False), elements


def _fit(x: Tensor, patches: Patches, h: Tensor) -> tuple[int, int]:
    """The patch size and the rows a sample; all operands checked."""
    patch = checks.patches(h, patches, x)
    checks.latents(x, h, x.shape)
    if len(h) not in (len(x), 2 * len(x)):
        raise InputError(f"{len(h)} rows for {len(x)} samples; it must be as many, or twice as many under guidance")
    return patch, len(h) // len(x)
