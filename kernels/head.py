"""The head of a step: the last residuals, modulated LayerNorm, linear map, unpatchify, guidance and eps scaling.

    h' = h + sum_k gate_k * branch_k
    f  = (LayerNorm(h') * (1 + scale) + shift) @ weight.T + bias              eps, and the variance if there is one
    e  = b * (f_uncond + s * (f_cond - f_uncond))                             on the guided channels of eps
    x <- cx * x + ce * e + (noise_on * exp(log_var / 2) + sigma) * noise      in the form that ends our own loop,
         + cp * previous;  previous <- px * x + pe * e                        with a sampler that has a memory

A program owns a tile of tokens of one sample, in both of its rows under guidance, so that nothing between the stream
and the latents is written to memory.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ebcache_fast.kernels import checks, launch
from ebcache_fast.kernels._features import add_row, features, guided, remember, sampler_update
from ebcache_fast.kernels._order import advance, begin
from ebcache_fast.kernels._patches import pixels
from ebcache_fast.kernels._stream import residual, vector_offsets
from ebcache_fast.ops.operands import GuidanceArgs, Linear, Norm, StepIndex, Update

MAX_BRANCHES = 2


@triton.jit
def _stream_tile(source, col, D):
    """Channels of the residual stream with its last branches, of the tokens that ``source`` names."""
    h, branches, gates, gate_start, stream_row, keep_token = source
    keep = keep_token[:, None] & (col < D)[None, :]
    return residual(h, branches, gates, stream_row[:, None] * D + col[None, :], gate_start + col[None, :], keep)


@triton.jit
def _row_features(
    stream, norm, at, strides, linear, batch_row, token, element, T, D,
    C: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, VARIANCE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The features of one batch row's tokens."""
    h, branches, gates = stream
    gate_strides, norm_strides = strides
    source = (
        h,
        branches,
        gates,
        vector_offsets(batch_row, True, at, gate_strides),
        batch_row.to(tl.int64) * T + token,
        token < T,
    )
    norm_start = vector_offsets(batch_row, True, at, norm_strides)
    return features(
        source, _stream_tile, norm, norm_start, linear, element, D, C, P, OUT, VARIANCE, ROWS, COLS, E
    )  # fmt: skip


@triton.jit
def _predict_kernel(
    out, stream, norm, at, strides, linear, settings, size, B, T, D,
    C: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, COPIES: tl.constexpr, GUIDED: tl.constexpr,
    launch_pdl: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    begin(launch_pdl)
    advance(at)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1)
    element = tl.arange(0, E)
    keep = (token < T)[:, None] & (element < C * P * P)[None, :]
    VARIANCE: tl.constexpr = OUT > C
    eps, variance = _row_features(
        stream, norm, at, strides, linear, sample, token, element, T, D, C, P, OUT, VARIANCE, ROWS, COLS, E
    )  # fmt: skip
    b = tl.load(settings + 1)
    where = pixels(sample, OUT, token, element, size, P)
    variance_at = C * size[0] * size[1]  # from a pixel of eps to that of its variance
    if COPIES == 2:
        other, other_variance = _row_features(
            stream, norm, at, strides, linear, sample + B, token, element, T, D,
            C, P, OUT, VARIANCE, ROWS, COLS, E,
        )  # fmt: skip
        mixed = guided(eps, other, settings, element, P, GUIDED)
        other = tl.where((element < GUIDED * P * P)[None, :], mixed, other)
        eps = mixed
        other_where = pixels(sample + B, OUT, token, element, size, P)
        tl.store(out + other_where, b * other, mask=keep)
        if VARIANCE:
            tl.store(out + other_where + variance_at, other_variance, mask=keep)
    tl.store(out + where, b * eps, mask=keep)
    if VARIANCE:
        tl.store(out + where + variance_at, variance, mask=keep)


@triton.jit
def _update_kernel(
    x, stream, norm, at, strides, linear, settings, update, size, copies, B, T, D,
    C: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, GUIDED: tl.constexpr,
    NOISE: tl.constexpr, MEMORY: tl.constexpr, launch_pdl: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    begin(launch_pdl)
    advance(at)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1)
    element = tl.arange(0, E)
    keep = (token < T)[:, None] & (element < C * P * P)[None, :]
    VARIANCE: tl.constexpr = OUT > C and NOISE
    eps = tl.zeros((ROWS, E), tl.float32)
    variance = tl.zeros((ROWS, E), tl.float32)
    for copy in range(copies):
        row_eps, row_variance = _row_features(
            stream, norm, at, strides, linear, sample + copy * B, token, element, T, D,
            C, P, OUT, VARIANCE, ROWS, COLS, E,
        )  # fmt: skip
        eps, variance = add_row(
            eps, variance, row_eps, row_variance, copy, copies, settings, element, P, GUIDED
        )  # fmt: skip

    where = pixels(sample, C, token, element, size, P)
    step = tl.load(at.step)
    noise = eps
    if NOISE:
        step_size = tl.cast(B, tl.int64) * C * size[0] * size[1]
        noise = tl.load(update.noise + step * step_size + where, mask=keep, other=0.0)
    latents = tl.load(x + where, mask=keep, other=0.0)
    eps *= tl.load(settings + 1)
    row = update.coefficients + step * (9 if MEMORY else 6)
    stepped = sampler_update(latents, eps, variance, noise, row, VARIANCE, NOISE)
    if MEMORY:
        stepped += tl.load(row + 6) * tl.load(update.previous + where, mask=keep, other=0.0)
        tl.store(update.previous + where, remember(latents, eps, row), mask=keep)
    tl.store(x + where, stepped, mask=keep)


def head_predict(
    h: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    norm: Norm,
    at: StepIndex,
    linear: Linear,
    guide: GuidanceArgs,
    out: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Write the guided and scaled output, (R, Cout, H, W) float32; see `ebcache_fast.ops.reference.head_predict`.

    Raises InputError for more than two branches and what `checks` refuses.
    """
    norm, linear = checks.norm_weights(norm), checks.weights(linear)
    rows, tokens, width = checks.stream(h, *branches)
    strides, samples = _strides(h, branches, gates, norm, at), checks.samples(h, guide)
    patch, channels = checks.head(h, linear, guide, out)
    checks.latents(out, h, (rows, channels, *out.shape[2:]))
    elements = launch.elements_of(guide.eps_channels, patch)
    entry = launch.parameters("head", rows * tokens, h.device)
    config = launch.fit_patches(entry, h, h.itemsize, elements, embeds=False, heads=True)
    with launch.on(h):
        _predict_kernel[(triton.cdiv(tokens, config.rows), samples)](
            out,
            (h, tuple(branches), tuple(gates)),
            norm,
            at,
            strides,
            linear,
            guide.settings,
            tuple(out.shape[2:]),
            samples,
            tokens,
            width,
            C=guide.eps_channels,
            P=patch,
            OUT=channels,
            COPIES=guide.copies,
            GUIDED=guide.channels,
            launch_pdl=pdl,
            ROWS=config.rows,
            COLS=config.cols,
            E=elements,
            num_warps=config.warps,
            **launch.OPTIONS,
        )


def head_update(
    x: Tensor,
    h: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    norm: Norm,
    at: StepIndex,
    linear: Linear,
    guide: GuidanceArgs,
    update: Update,
    *,
    pdl: bool = False,
) -> None:
    """The end of a step of our own loop, on x (B, C, H, W) float32 in place; see the reference of this name.

    Raises InputError for more than two branches and what `checks` refuses.
    """
    norm, linear = checks.norm_weights(norm), checks.weights(linear)
    rows, tokens, width = checks.stream(h, *branches)
    strides, samples = _strides(h, branches, gates, norm, at), checks.samples(h, guide)
    patch, channels = checks.head(h, linear, guide, x)
    checks.latents(x, h, (samples, guide.eps_channels, *x.shape[2:]))
    checks.update(update, x)
    elements = launch.elements_of(guide.eps_channels, patch)
    entry = launch.parameters("head", rows * tokens, h.device)
    config = launch.fit_patches(entry, h, h.itemsize, elements, embeds=False, heads=True)
    with launch.on(h):
        _update_kernel[(triton.cdiv(tokens, config.rows), samples)](
            x,
            (h, tuple(branches), tuple(gates)),
            norm,
            at,
            strides,
            linear,
            guide.settings,
            update,
            tuple(x.shape[2:]),
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


def _strides(
    h: Tensor, branches: Sequence[Tensor], gates: Sequence[Tensor], norm: Norm, at: StepIndex
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Strides of a step and of a condition in the gates' table and in the norm's; both checked."""
    checks.branch_count(branches, gates, MAX_BRANCHES)
    checks.at(h, at)
    norm_strides = checks.norm(h, norm)
    return checks.vectors(h, *gates) if gates else norm_strides, norm_strides
