"""The plain-torch truth of every fused operation: one function per kernel, with the kernel's signature.

Shapes: B samples, R batch rows (B, or 2B under guidance: the conditional ones, then the unconditional), T tokens,
D channels, K cache slots, S steps of the trajectory. The residual stream h and all branches are (R, T, D). Latents x
are (B, C, H, W), in float32 or float64, whatever the model's dtype. Whatever takes a `StepIndex` does what its
``advance`` asks for as well. Nothing here knows of models, plans or caches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ebcache_fast.ops.operands import GuidanceArgs, Linear, Norm, Patches, Quantised, StepIndex, Update
from ebcache_fast.ops.reference_tokens import attention as attention
from ebcache_fast.ops.reference_tokens import copy as copy
from ebcache_fast.ops.reference_tokens import gather_tokens as gather_tokens
from ebcache_fast.ops.reference_tokens import scatter_tokens as scatter_tokens
from ebcache_fast.ops.reference_tokens import select_tokens as select_tokens
from ebcache_fast.ops.reference_tokens import subtract as subtract
from ebcache_fast.ops.reference_tokens import window_attention as window_attention
from ebcache_fast.ops.update import remember, sampler_update

SMALLEST_ROW = 1e-12  # what counts as the largest of a row of zeros, which has a scale above 0 as well


def embed(x: Tensor, patches: Patches, h: Tensor) -> None:
    """Write the tokens of latents x (B, C, H, W) into h (R, T, D), the same for every row of a sample."""
    dtype = patches.weight.dtype
    tokens = F.conv2d(x.to(dtype), patches.weight, patches.bias, stride=patches.weight.shape[2])  # (B, D, H/p, W/p)
    tokens = tokens.flatten(2).transpose(1, 2) + patches.positions  # (B, T, D)
    h.view(-1, *tokens.shape).copy_(tokens.expand(len(h) // len(x), *tokens.shape))


def embed_norm_modulate(x: Tensor, patches: Patches, norm: Norm, at: StepIndex, h: Tensor, u: Tensor) -> None:
    """`embed` into h, and the first branch's modulated input into u, both (R, T, D)."""
    embed(x, patches, h)
    norm_modulate(h, norm, at, u)
    advance(at)


def norm_modulate(h: Tensor, norm: Norm, at: StepIndex, u: Tensor | None = None) -> Tensor:
    """``LayerNorm(h) * (1 + scale) + shift`` over the channels of h -> (R, T, D), in u's memory if it is given."""
    normed = F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias, norm.eps)
    return _plus_product(_rows(norm.shift, at), normed, 1 + _rows(norm.scale, at), u)


def gated_residual(h: Tensor, branches: Sequence[Tensor], gates: Sequence[Tensor], at: StepIndex) -> None:
    """``h += sum_k gates[k] * branches[k]`` in place; branches (R, T, D) fresh or cached, ungated; gates (S, U, D)."""
    add_gated(h, branches, gates, at)
    advance(at)


def add_gated(h: Tensor, branches: Sequence[Tensor], gates: Sequence[Tensor], at: StepIndex) -> None:
    """`gated_residual`, of which it is the sum."""
    for branch, gate in zip(branches, gates, strict=True):
        _plus_product(h, _rows(gate, at), branch, h)


def gated_residual_norm_modulate(
    h: Tensor, branches: Sequence[Tensor], gates: Sequence[Tensor], norm: Norm, at: StepIndex, u: Tensor
) -> None:
    """`gated_residual` on h, and the next branch's modulated input into u.

    With a cached attention output among ``branches`` this is the cached-attention substitution.
    """
    add_gated(h, branches, gates, at)
    norm_modulate(h, norm, at, u)
    advance(at)


def gated_residual_norm_quantise(
    h: Tensor, branches: Sequence[Tensor], gates: Sequence[Tensor], norm: Norm, at: StepIndex, u: Quantised
) -> None:
    """`gated_residual_norm_modulate` with the next branch's input in float8: u (R, T, D), a scale a token, (R, T)."""
    add_gated(h, branches, gates, at)
    quantise(norm_modulate(h, norm, at), u)
    advance(at)


def quantise(rows: Tensor, out: Quantised) -> None:
    """Rows (..., D) in float8: ``scale = max |row| / 448`` and ``value = row / scale``, to nearest; 448 is the largest.

    An element is wrong by at most a sixteenth of itself, or, where it is small, by 2^-10 of its row's scale. A NaN
    stays one, and has no part in its row's scale, as on a GPU, whose maximum of a NaN and a number is the number.
    Source of the format: Micikevicius et al., arXiv 2209.05433, E4M3.
    """
    sizes = rows.abs().nan_to_num(nan=0.0, posinf=torch.inf)
    torch.div(sizes.amax(dim=-1).float().clamp(min=SMALLEST_ROW), 448, out=out.scales)
    out.values.copy_(rows / out.scales.unsqueeze(-1))


def gated_sum(slots: Tensor, gates: Tensor, at: StepIndex, base: Tensor | None, sums: Tensor) -> None:
    """``sums[j] = base + sum_k gates[step + j, k] * slots[k]``: all layers of ATTN_MLP steps at once.

    slots (K, R, T, D), gates (S, K, U, D), base (R, T, D) or None for 0, sums (n, R, T, D) for n coming steps. No
    branch runs in such a step, so that no layer waits for another, and the sums do not depend on x.
    """
    for j, total in enumerate(sums):
        factors = gates.index_select(0, at.step + j)[0].index_select(1, at.row_of).unsqueeze(2)  # (K, R, 1, D)
        if base is None:
            torch.mul(factors[0], slots[0], out=total)
        else:
            torch.addcmul(base, factors[0], slots[0], out=total)
        for gate, slot in zip(factors[1:], slots[1:], strict=True):
            total.addcmul_(gate, slot)
    advance(at)


def head(
    h: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    norm: Norm,
    at: StepIndex,
    linear: Linear,
    out: Tensor,
) -> None:
    """The model's raw output: the last residuals, modulated LayerNorm, linear map, unpatchify; out (R, Cout, H, W).

    A token's features are its patch row by row, channels last. h stays as it is.
    """
    if branches:
        h = h.clone()
        add_gated(h, branches, gates, at)
    tokens = F.linear(norm_modulate(h, norm, at), linear.weight, linear.bias)  # (R, T, p * p * Cout)
    unpatchify(tokens, out)


def unpatchify(tokens: Tensor, out: Tensor) -> None:
    """Tokens (R, T, p * p * Cout), each its patch row by row, channels last -> out (R, Cout, H, W)."""
    rows, channels, height, width = out.shape
    patch = int((tokens.shape[2] // channels) ** 0.5)
    grid = tokens.view(rows, height // patch, width // patch, patch, patch, channels)
    out.view(rows, channels, height // patch, patch, width // patch, patch).copy_(grid.permute(0, 5, 1, 3, 2, 4))


def head_predict(
    h: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    norm: Norm,
    at: StepIndex,
    linear: Linear,
    guide: GuidanceArgs,
    out: Tensor,
) -> None:
    """`head`, then guidance and eps scaling; out (R, Cout, H, W) in the dtype of latents.

    Under guidance the guided eps channels of both halves are alike, all others stay each row's own. b multiplies
    every eps channel and no variance channel.
    """
    head(h, branches, gates, norm, at, linear, out)
    guide_and_scale(out, guide)
    advance(at)


def guide_and_scale(out: Tensor, guide: GuidanceArgs) -> None:
    """Guidance, then eps scaling, of a raw output (R, Cout, H, W) in place; see `head_predict`."""
    cfg_scale, eps_scale = guide.settings
    if guide.copies == 2:
        cond, uncond = out[:, : guide.channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        cond.copy_(guided)
        uncond.copy_(guided)
    out[:, : guide.eps_channels] *= eps_scale


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
) -> None:
    """`head_predict`, then the sampler's step on x (B, C, H, W) in place: the end of a step of our own loop."""
    patch_elements = x[0].numel() // h.shape[1]  # C * p * p
    out = x.new_empty(len(h), x.shape[1] * len(linear.weight) // patch_elements, *x.shape[2:])
    head(h, branches, gates, norm, at, linear, out)
    guide_and_scale(out, guide)
    step_on(x, out, guide, at, update)
    advance(at)


def step_on(x: Tensor, out: Tensor, guide: GuidanceArgs, at: StepIndex, update: Update) -> None:
    """The sampler's step on x (B, C, H, W) in place, from a guided and scaled output (R, Cout, H, W)."""
    eps, variance = out[: len(x), : guide.eps_channels], out[: len(x), guide.eps_channels :]
    noise = None if update.noise is None else update.noise[at.step][0]
    row, learned = update.coefficients[at.step][0], variance if variance.shape[1] else None
    stepped = sampler_update(x, eps, learned, noise, row, update.previous)
    if update.previous is not None:
        update.previous.copy_(remember(x, eps, row))
    x.copy_(stepped)


def run_update(
    x: Tensor,
    sums: Tensor,
    patches: Patches,
    norm: Norm,
    at: StepIndex,
    linear: Linear,
    guide: GuidanceArgs,
    update: Update,
) -> None:
    """A whole run of n ATTN_MLP steps on x (B, C, H, W) in place, from their gated sums (n, R, T, D).

    Each step is embed, its sum, head, guidance, eps scaling and the sampler's step; none mixes tokens.
    """
    h = torch.empty_like(sums[0])
    for j, total in enumerate(sums):
        embed(x, patches, h)
        h += total
        head_update(x, h, (), (), norm, StepIndex(at.step + j, at.row_of), linear, guide, update)
    advance(at)


def linear_gelu(u: Tensor, linear: Linear, out: Tensor) -> None:
    """``gelu_tanh(u @ weight.T + bias)``: u (M, D) -> out (M, F), the first half of the MLP.

    Source: Hendrycks and Gimpel, arXiv 1606.08415, the tanh approximation that the original DiT uses.
    """
    out.copy_(F.gelu(F.linear(u, linear.weight, linear.bias), approximate="tanh"))


def scaled_linear(u: Quantised, weight: Quantised, bias: Tensor, out: Tensor) -> None:
    """``u @ weight.T + bias`` of float8 matrices: u (M, D), a scale a row; weight (F, D), a scale a row; out (M, F)."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    product = F.linear(u.values.to(dtype), weight.values.to(dtype))
    out.copy_(product * u.scales.unsqueeze(1) * weight.scales + bias)


def advance(at: StepIndex) -> None:
    """Store the step for a later operation, if ``at.advance`` asks for it: ``to = step + by``."""
    if at.advance is not None:
        torch.add(at.step, at.advance.by, out=at.advance.to)


def _plus_product(base: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``base + left * right``, in half precision rounded once.

    Else it is rounded twice, as models' own code does it: layers that quantise their input find the very one there.
    """
    if base.itemsize < 4:
        return torch.addcmul(base, left, right, out=out)
    return torch.add(base, left * right, out=out)


def _rows(vectors: Tensor, at: StepIndex) -> Tensor:
    """The vectors (S, U, D) that the batch rows take -> (R, 1, D)."""
    return vectors.index_select(0, at.step)[0].index_select(0, at.row_of).unsqueeze(1)
