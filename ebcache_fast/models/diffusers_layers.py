"""Base of diffusers' families: refusals, text, positions, and the two usual branches."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import BranchResources, Conditioning, Family
from ebcache_fast.models.layers import is_known, is_watched, linear_into, walk


class DiffusersFamily(Family):
    """A transformer of diffusers. Raises what `Family` does, and InputError for a model that diffusers itself caches or
    casts layer by layer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        refuse_other_ways(model)

    def _check_latents(self, latents: tuple[int, ...], channels: int) -> None:
        """Raise InputError for latents of other channels, or that no patches cover."""
        patch, sides = self.patch, ("frames", "height", "width")[-len(self.patch) :]
        fits = len(latents) == 1 + len(patch) and latents[0] == channels
        if not fits or any(not size or size % part for size, part in zip(latents[1:], patch, strict=True)):
            raise InputError(
                f"x of shape (rows, {', '.join(map(str, latents))}) does not fit; this model takes (rows, {channels}, "
                f"{', '.join(sides)}), of which the last {len(sides)} are multiples of {patch}"
            )

    def _check_text(self, context: Conditioning, width: int) -> None:
        """Raise InputError where no text (rows, tokens, width) comes first in the context."""
        if not context:
            raise InputError(f"{type(self._model).__name__} is given no text to follow here; use its pipeline instead")
        text = cast(Tensor, context[0])
        if text.ndim != 3 or text.shape[2] != width or not text.shape[1]:
            raise InputError(
                f"text of shape {tuple(text.shape)} does not fit; this model takes (rows, tokens, {width})"
            )


def refuse_other_ways(model: nn.Module) -> None:
    """Raise InputError where hooks of diffusers keep features, or weights in a dtype of their own or somewhere else."""
    for path, module in walk(model):
        registry = vars(module).get("_diffusers_hook")
        for name, hook in registry.hooks.items() if registry is not None else ():
            if hook._is_stateful or name == "layerwise_casting" or name.endswith("group_offloading"):
                whose = type(model).__name__ + (path and f".{path}")
                raise InputError(
                    f"{whose} has diffusers' hook {name!r}, and what it computes, keeps or holds is not what its parts "
                    "say; remove diffusers' own caches, layerwise casting and group offloading first: of offloading, "
                    "that of whole models (enable_model_cpu_offload) may stay"
                )


def latents_of(embed: Any) -> tuple[int, int, int]:
    """The latents (C, H, W) that a patch embedding is made for."""
    rows, columns = embed.proj.kernel_size
    return embed.proj.in_channels, embed.height * rows, embed.width * columns


def positions_of(embed: Any, latents: tuple[int, ...]) -> Tensor:
    """A patch embedding's positions (T, D) for latents of this shape (C, H, W), in whatever dtype, as it makes them."""
    rows, columns = (side // embed.proj.kernel_size[0] for side in latents[1:])
    if (rows, columns) == (embed.height, embed.width):
        return cast(Tensor, embed.pos_embed[0])
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    places: Tensor = get_2d_sincos_pos_embed(
        embed.pos_embed.shape[2],
        (rows, columns),
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        device=embed.pos_embed.device,
        output_type="pt",
    )
    return places.float()  # as the model rounds them


def is_usual_attention(attention: Any, processor: str = "AttnProcessor2_0", also: tuple[str, ...] = ()) -> bool:
    """True if attention is three projections, torch's attention and a projection; all else runs as its module.

    also: names of additions that the caller takes care of.
    """
    additions = {"group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "residual_connection"}
    additions |= {"fused_projections", "to_add_out"}
    return (
        type(attention.processor).__name__ == processor
        and is_known(attention.processor)
        and not any(getattr(attention, name, None) for name in additions.difference(also))
        and attention.rescale_output_factor == 1
        and not any(map(is_watched, (attention, attention.to_out[1])))
    )


def is_usual_feed_forward(feed_forward: Any) -> bool:
    """True if it is a linear map, a tanh-GELU and a linear map, and perhaps a dropout, which does nothing here."""
    net = feed_forward.net
    return (
        len(net) in (3, 4)
        and type(net[0]).__name__ == "GELU"
        and net[0].approximate == "tanh"
        and all(isinstance(layer, nn.Dropout) for layer in (net[1], *net[3:]))
        and not any(map(is_watched, (feed_forward, *net[:2], *net[3:])))
    )


def feed_forward_into(feed_forward: Any, u: Tensor, out: Tensor, res: BranchResources) -> None:
    """Write ``feed_forward(u)``, (N, T, D), into ``out``; of the usual kind through the fused operations."""
    if not is_usual_feed_forward(feed_forward):
        out.copy_(feed_forward(u))
        return
    gelu, linear = feed_forward.net[0], feed_forward.net[2]
    widened = res.linear_gelu(gelu.proj, u)
    linear_into(linear, gelu(u) if widened is None else widened, out)


def self_attention_into(attention: Any, u: Tensor, out: Tensor, res: BranchResources) -> None:
    """Write ``attention(u)``, (N, T, D), into ``out``; of the usual kind through the fused operations."""
    if not is_usual_attention(attention):
        refuse_window(attention, res)
        out.copy_(attention(u))
        return
    linear_into(attention.to_out[0], _attend(attention, u, res), out)


def refuse_window(attention: Any, res: BranchResources) -> None:
    """Raise InputError where a module of another kind, which runs as it is, is to attend within a window."""
    if res.window:
        raise InputError(
            f"a {type(attention).__name__} of another kind runs as it is, and takes no window of {res.window} "
            "tokens; compute or reuse its output instead"
        )


def heads_of(attention: Any, projected: Tensor) -> Tensor:
    """(N, T, D) as heads, (N, heads, T, D / heads)."""
    rows, tokens, _ = projected.shape
    return projected.view(rows, tokens, attention.heads, -1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of heads (N, heads, T, D / heads) -> (N, T, D); bias (N, 1, 1, keys) is added to the scores."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def rotated(heads: Tensor, rotary: tuple[Tensor, Tensor], text: int) -> Tensor:
    """Heads (N, heads, T, d), of which those after the text are turned by their angles (T - text, d), two channels
    at a time.

    Source: Su et al., arXiv 2104.09864, equation 34.
    """
    cos, sin = rotary
    video = heads[:, :, text:].float()
    even, odd = video.view(*video.shape[:3], -1, 2).unbind(4)
    turned = video * cos + torch.stack((-odd, even), dim=4).flatten(3) * sin
    return torch.cat((heads[:, :, :text], turned.to(heads.dtype)), dim=2)


def _attend(attention: Any, u: Tensor, res: BranchResources) -> Tensor:
    """Self-attention before its output projection, (N, T, D) -> (N, T, D)."""
    n, tokens, width = u.shape
    projections = attention.to_q, attention.to_k, attention.to_v
    if res.operations.attention is None or res.window:
        q, k, v = (heads_of(attention, project(u)) for project in projections)
        return res.attend(q, k, v).transpose(1, 2).flatten(2)
    packed = res.scratch.buffer("qkv", n, tokens, 3 * width)
    for projection, part in zip(projections, packed.chunk(3, dim=2), strict=True):
        linear_into(projection, u, part)
    out = res.scratch.buffer("attention", n, tokens, width)
    res.operations.attention(packed, attention.heads, out)
    return out
