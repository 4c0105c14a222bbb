"""A whole run of ATTN_MLP steps, with the latents in registers.

    for each step j of the run:
        h  = patch @ weight + bias + position + sums_j
        x <- the head's update of x from h: see `head`

Given its gated sums such a step mixes no tokens, so that a program carries its tile of latents through all of them and
writes it once. What a sampler with a memory keeps from step to step stays in registers as well.
"""

import triton
import triton.language as tl
from torch import Tensor

from ebcache_fast.kernels import checks, launch
from ebcache_fast.kernels._features import add_row, features, remember, sampler_update
from ebcache_fast.kernels._order import advance, begin
from ebcache_fast.kernels._patches import embedded, pixels
from ebcache_fast.kernels._stream import load, vector_offsets
from ebcache_fast.ops.operands import GuidanceArgs, Linear, Norm, Patches, StepIndex, Update


@triton.jit
def _summed_tile(source, col, D):
    """Channels of the embedded latents with their gated sum, of the tokens that ``source`` names."""
    latents, patches, total, token, stream_row, keep_token, element, C, P = source
    keep = keep_token[:, None] & (col < D)[None, :]
    tokens = embedded(latents, patches, token, col, D, keep_token, element, C, P)
    return tokens + load(total, stream_row[:, None] * D + col[None, :], keep)


@triton.jit
def _run_kernel(
    x, sums, patches, norm, at, strides, linear, settings, update, size, steps, copies, B, T, D,
    C: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, GUIDED: tl.constexpr,
    NOISE: tl.constexpr, MEMORY: tl.constexpr, launch_pdl: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    begin(launch_pdl)
    advance(at)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1)
    element = tl.arange(0, E)
    keep_token = token < T
    keep = keep_token[:, None] & (element < C * P * P)[None, :]
    where = pixels(sample, C, token, element, size, P)
    first_step = tl.load(at.step)
    image_size = tl.cast(B, tl.int64) * C * size[0] * size[1]
    VARIANCE: tl.constexpr = OUT > C and NOISE

    latents = tl.load(x + where, mask=keep, other=0.0)
    if MEMORY:
        previous = tl.load(update.previous + where, mask=keep, other=0.0)
    for j in range(steps):
        total = sums + j * (tl.cast(B * copies, tl.int64) * T * D)
        eps = tl.zeros((ROWS, E), tl.float32)
        variance = tl.zeros((ROWS, E), tl.float32)
        for copy in range(copies):
            batch_row = sample + copy * B
            vectors = vector_offsets(batch_row, True, at, strides) + j * tl.cast(strides[0], tl.int64)
            stream_row = batch_row.to(tl.int64) * T + token
            source = (latents, patches, total, token, stream_row, keep_token, element, C, P)
            row_eps, row_variance = features(
                source, _summed_tile, norm, vectors, linear, element, D, C, P, OUT, VARIANCE, ROWS, COLS, E
            )  # fmt: skip
            eps, variance = add_row(
                eps, variance, row_eps, row_variance, copy, copies, settings, element, P, GUIDED
            )  # fmt: skip
        noise = eps
        if NOISE:
            noise = tl.load(update.noise + (first_step + j) * image_size + where, mask=keep, other=0.0)
        eps *= tl.load(settings + 1)
        row = update.coefficients + (first_step + j) * (9 if MEMORY else 6)
        stepped = sampler_update(latents, eps, variance, noise, row, VARIANCE, NOISE)
        if MEMORY:
            stepped += tl.load(row + 6) * previous
            previous = remember(latents, eps, row)
        latents = stepped
    tl.store(x + where, latents, mask=keep)
    if MEMORY:
        tl.store(update.previous + where, previous, mask=keep)


def run_update(
    x: Tensor,
    sums: Tensor,
    patches: Patches,
    norm: Norm,
    at: StepIndex,
    linear: Linear,
    guide: GuidanceArgs,
    update: Update,
    *,
    pdl: bool = False,
) -> None:
    """Run whole ATTN_MLP steps, one for each of sums (n, R, T, D), on x (B, C, H, W) float32 in place.

    See `ebcache_fast.ops.reference.run_update`. Raises InputError for what `checks` refuses.
    """
    patches, norm, linear = checks.weights(patches), checks.norm_weights(norm), checks.weights(linear)
    rows, tokens, width = checks.stream(sums[0])
    checks.alike(sums, sums, (len(sums), rows, tokens, width))
    samples = checks.samples(sums[0], guide)
    checks.latents(x, sums, (samples, guide.eps_channels, *x.shape[2:]))
    patch, channels = checks.head(sums[0], linear, guide, x)
    checks.patches(sums[0], patches, x)
    strides = checks.norm(sums[0], norm)
    checks.at(sums[0], at)
    checks.update(update, x)
    elements = launch.elements_of(guide.eps_channels, patch)
    entry = launch.parameters("run", rows * tokens, x.device)
    config = launch.fit_patches(entry, x, sums.itemsize, elements, embeds=True, heads=True)
    with launch.on(x):
        _run_kernel[(triton.cdiv(tokens, config.rows), samples)](
            x,
            sums,
            patches,
            norm,
            at,
            strides,
            linear,
            guide.settings,
            update,
            tuple(x.shape[2:]),
            len(sums),
            guide.copies,
            samples,
            tokens,
            width,
            C=guide.eps_channels,
            P=patch,
            OUT=channels,
            GUIDED=guide.channels,
            NOISE=update.noise is not None,
            MEMORY=update.previous is not None,
            launch_pdl=pdl,
            ROWS=config.rows,
            COLS=config.cols,
            E=elements,
            num_warps=config.warps,
            **launch.OPTIONS,
        )
