"""diffusers' PixArt (``PixArtTransformer2DModel``, Alpha and Sigma) seen as a ``Denoiser``, known by its attributes."""

import copy
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ebcache_fast import reference
from ebcache_fast.errors import InputError
from ebcache_fast.models.denoiser import Context, Means, Modulation, Scratch
from ebcache_fast.models.diffusers_layers import (
    attend,
    feed_forward_into,
    first_foreign,
    heads_of,
    is_usual_attention,
    refuse_other_ways,
    self_attention_into,
)
from ebcache_fast.models.dit_layout import check_layout, check_norms
from ebcache_fast.models.layers import is_plain, is_plain_patching, is_watched, linear_into
from ebcache_fast.operands import Linear, Patches
from ebcache_fast.plan import Branch, BranchShape, ModelShape

_LAYOUT = (
    "transformer_blocks.0.norm1.eps",
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.attn1.heads",
    "transformer_blocks.0.attn2.to_k.in_features",
    "transformer_blocks.0.norm2.eps",
    "transformer_blocks.0.ff.net.2.in_features",
    "transformer_blocks.0.scale_shift_table",
    "adaln_single.emb.timestep_embedder",
    "adaln_single.linear",
    "caption_projection",
    "pos_embed.proj.kernel_size",
    "pos_embed.pos_embed.shape",
    "norm_out.eps",
    "scale_shift_table",
    "proj_out.out_features",
)
USUAL_TEXT = 300  # tokens of a prompt, as PixArt-Sigma's pipeline has them


class PixArtContext(NamedTuple):
    """What a call gives besides latents and timesteps."""

    text: Tensor  # (N, L, E), as the text encoder gives it
    mask: Tensor | None = None  # (N, L) of which 1 is kept, or (N, 1, L) to be added to scores
    resolution: Tensor | None = None  # (N, 2), and
    aspect_ratio: Tensor | None = None  # (N, 1), of models that were trained with sizes

    def rows(self, chosen: Tensor) -> "PixArtContext":
        """Of these rows (M,), in this order."""
        return PixArtContext(self.text[chosen], *(None if one is None else one[chosen] for one in self[1:]))


class PixArtDenoiser:
    """The parts of a PixArtTransformer2DModel, read from the live module.

    Every layer is self-attention, cross-attention to the text, which takes the stream as it is and has no gate, and an
    MLP (Chen et al., arXiv 2310.00426, section 2.3). Keys and values of the text are computed once for a run. Raises
    InputError, naming the attribute, for a module that lacks one or has other norms, and for one that
    diffusers itself caches or casts layer by layer.
    """

    text_tokens = 0  # text stands beside the stream
    num_classes, has_null_label = 1, True  # rows differ by their text alone

    def __init__(self, model: nn.Module) -> None:
        check_layout(model, _LAYOUT, "diffusers' PixArtTransformer2DModel")
        refuse_other_ways(model)
        self._model = cast(Any, model)  # known by its attributes: there is no type to name
        self._blocks = list(self._model.transformer_blocks)
        of_layers = (f"transformer_blocks.{i}.{norm}" for i in range(len(self._blocks)) for norm in ("norm1", "norm2"))
        check_norms(model, (*of_layers, "norm_out"))
        embed = self._model.pos_embed
        self.latent_shape: tuple[int, int, int]
        self.latent_shape = embed.proj.in_channels, embed.height * self._patch_size, embed.width * self._patch_size
        self._text = USUAL_TEXT

    def sized(self, latents: tuple[int, ...], context: Context) -> Self:
        given = cast(PixArtContext, context)
        channels, patch = self.latent_shape[0], self._patch_size
        if len(latents) != 3 or latents[0] != channels or any(not side or side % patch for side in latents[1:]):
            shape = ", ".join(map(str, latents))
            raise InputError(
                f"x of shape (rows, {shape}) does not fit; this model takes (rows, {channels}, height, width), both "
                f"multiples of {patch}"
            )
        if given.text.ndim != 3 or given.text.shape[2] != self._text_width or not given.text.shape[1]:
            raise InputError(
                f"text of shape {tuple(given.text.shape)} does not fit; this model takes (rows, tokens, "
                f"{self._text_width})"
            )
        if self._has_sizes and (given.resolution is None or given.aspect_ratio is None):
            raise InputError("resolution or aspect_ratio is missing, which this model takes; pass added_cond_kwargs")
        sized = copy.copy(self)
        vars(sized).pop("shape", None)
        sized.latent_shape, sized._text = cast(tuple[int, int, int], tuple(latents)), given.text.shape[1]
        return sized

    def example(self, rows: int) -> tuple[tuple[int, ...], Context]:
        patch, weight = self._patch_size, self.weight()
        generator = torch.Generator("cpu").manual_seed(1)
        text = torch.randn(rows, 3, self._text_width, generator=generator, device="cpu").to(weight)
        mask = torch.ones(rows, 3, dtype=torch.int64, device=weight.device)
        mask[-1, -1] = 0
        resolution, aspect_ratio = (weight.new_tensor(size).expand(rows, -1) for size in ((512.0, 384.0), (0.75,)))
        context = PixArtContext(text, mask, resolution, aspect_ratio) if self._has_sizes else PixArtContext(text, mask)
        return (self.latent_shape[0], 2 * patch, 3 * patch), context

    @cached_property
    def shape(self) -> ModelShape:
        block, depth, width = self._blocks[0], len(self._blocks), self._width
        hidden, tokens, square = block.ff.net[2].in_features, self._tokens, width * width
        ends = self._patch_size**2 * (self.latent_shape[0] + self.out_channels) * width
        timestep = 256 * width + 7 * square  # two layers that embed it, of 256 frequencies, and one to six vectors
        return ModelShape(
            depth=depth,
            width=width,
            tokens=tokens,
            branches=(
                BranchShape(Branch.SELF_ATTN, 4 * square * tokens + 2 * tokens * tokens * width, 4 * square),
                BranchShape(Branch.CROSS_ATTN, 2 * square * tokens + 2 * tokens * self._text * width, 2 * square),
                BranchShape(Branch.MLP, 2 * width * hidden * tokens, 2 * width * hidden),
            ),
            fixed_macs=timestep + ends * tokens,
            fixed_weights=timestep + ends,
            fingerprint=(
                ("depth", depth),
                ("hidden_size", width),
                ("mlp_hidden_size", hidden),
                ("num_heads", block.attn1.heads),
                ("patch_size", self._patch_size),
                ("in_channels", self.latent_shape[0]),
                ("out_channels", self.out_channels),
                ("text_size", self._text_width),
            ),
        )

    def weight(self) -> Tensor:
        return cast(Tensor, next(self._blocks[0].attn1.to_q.parameters()))

    def conditions(self, labels: Tensor) -> Tensor:
        return torch.arange(len(labels), device=labels.device) if self._has_sizes else torch.zeros_like(labels)

    def modulation(self, t: Tensor, y: Tensor, context: Context, out: Modulation) -> None:
        given, steps, rows = cast(PixArtContext, context), len(t), len(y)
        single = self._model.adaln_single
        sizes = (
            None if one is None or not self._has_sizes else one[y].repeat(steps, 1)
            for one in (given.resolution, given.aspect_ratio)
        )
        embedded = single.emb(t.repeat_interleave(rows), *sizes, steps * rows, self.weight().dtype)  # (S * U, D)
        shared = single.linear(single.silu(embedded)).view(steps, rows, 6, -1)
        for layer, block in enumerate(self._blocks):
            vectors = (shared + block.scale_shift_table).view(steps, rows, 2, 3, -1).permute(0, 2, 3, 1, 4)
            of_layer = out.layers[:, layer]  # (S, 3, 3, U, D)
            of_layer[:, 0::2] = vectors
            of_layer[:, 1] = 1.0  # of cross-attention the gate alone is read
        head = embedded.view(steps, rows, 1, -1) + self._model.scale_shift_table
        out.head.copy_(head.transpose(1, 2))

    def prepare(self, context: Context, constants: Scratch) -> None:
        given = cast(PixArtContext, context)
        projection = self._model.caption_projection
        text = given.text.to(self.weight().dtype)
        text = text if projection is None else projection(text)  # (N, L, D)
        rows, length, width = text.shape
        constants.buffer("caption", rows, length, width).copy_(text)
        constants.buffer("bias", rows, 1, length).copy_(_bias_of(given.mask, text))
        for layer, block in enumerate(self._blocks):
            kept = constants.buffer(f"keys and values {layer}", 2, rows, length, width)
            linear_into(block.attn2.to_k, text, kept[0])
            linear_into(block.attn2.to_v, text, kept[1])
        constants.buffer("positions", self._tokens, self._width).copy_(self._positions())

    def embed(self, x: Tensor, constants: Scratch) -> Tensor:
        return cast(Tensor, self._model.pos_embed(x))

    def final(self, h: Tensor) -> Tensor:
        return h

    def norm(self, layer: int, branch: Branch) -> nn.LayerNorm | None:
        block = self._blocks[layer]
        return {Branch.SELF_ATTN: block.norm1, Branch.MLP: block.norm2}.get(branch)

    def run_branch(self, layer: int, branch: Branch, u: Tensor, out: Tensor, means: Means) -> None:
        block = self._blocks[layer]
        if branch is Branch.SELF_ATTN:
            self_attention_into(block.attn1, u, out, means)
        elif branch is Branch.CROSS_ATTN:
            self._cross_attention_into(layer, u, out, means)
        else:
            feed_forward_into(block.ff, u, out, means)

    def _cross_attention_into(self, layer: int, u: Tensor, out: Tensor, means: Means) -> None:
        attention, sizes = self._blocks[layer].attn2, (len(u), self._text, self._width)
        bias = means.constants.buffer("bias", len(u), 1, self._text)
        if not is_usual_attention(attention):
            caption = means.constants.buffer("caption", *sizes)
            out.copy_(attention(u, encoder_hidden_states=caption, attention_mask=bias))
            return
        k, v = means.constants.buffer(f"keys and values {layer}", 2, *sizes)
        q, k, v = (heads_of(attention, each) for each in (attention.to_q(u), k, v))
        linear_into(attention.to_out[0], attend(q, k, v, bias.unsqueeze(1)), out)

    def passed_over_hooks(self) -> str | None:
        of_a_layer = ("", ".norm1", ".norm2")
        of_layers = (f"transformer_blocks.{i}{name}" for i in range(len(self._blocks)) for name in of_a_layer)
        passed_over = ("transformer_blocks", "adaln_single", "norm_out", *of_layers)
        return next((path for path in passed_over if is_watched(attrgetter(path)(self._model))), None)

    def foreign_layer(self) -> str | None:
        ends = () if self.has_plain_ends else ("pos_embed", "proj_out")
        branches = ("attn1", "attn2", "ff")
        called = (f"transformer_blocks.{i}.{name}" for i in range(len(self._blocks)) for name in branches)
        return first_foreign((path, attrgetter(path)(self._model)) for path in (*ends, *called))

    @property
    def has_plain_ends(self) -> bool:
        embed, linear = self._model.pos_embed, self._model.proj_out
        if not (is_plain(linear) and is_plain_patching(embed) and embed.flatten and embed.pos_embed_max_size is None):
            return False
        return len({weight.dtype for weight in (self.weight(), embed.proj.weight, linear.weight)}) == 1

    def patches(self, constants: Scratch) -> Patches:
        proj = self._model.pos_embed.proj
        return Patches(proj.weight, proj.bias, constants.buffer("positions", self._tokens, self._width))

    def head_linear(self) -> Linear:
        return Linear(self._model.proj_out.weight, self._model.proj_out.bias)

    @property
    def head_norm(self) -> nn.LayerNorm:
        return cast(nn.LayerNorm, self._model.norm_out)

    def head(self, u: Tensor) -> Tensor:
        out = u.new_empty(len(u), self.out_channels, *self.latent_shape[1:])
        reference.unpatchify(self._model.proj_out(u), out)
        return out

    @property
    def out_channels(self) -> int:
        return cast(int, self._model.proj_out.out_features // self._patch_size**2)

    def _positions(self) -> Tensor:
        """Of the tokens of latents of this size (T, D), in whatever dtype."""
        embed = self._model.pos_embed
        grid = tuple(side // self._patch_size for side in self.latent_shape[1:])
        if grid == (embed.height, embed.width):
            return cast(Tensor, embed.pos_embed[0])
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        places: Tensor = get_2d_sincos_pos_embed(
            self._width,
            grid,
            base_size=embed.base_size,
            interpolation_scale=embed.interpolation_scale,
            device=self.weight().device,
            output_type="pt",
        )
        return places.float()  # as the model rounds them

    @property
    def _tokens(self) -> int:
        rows, columns = (side // self._patch_size for side in self.latent_shape[1:])
        return rows * columns

    @property
    def _width(self) -> int:
        return cast(int, self._model.pos_embed.pos_embed.shape[2])

    @property
    def _text_width(self) -> int:
        projection = self._model.caption_projection
        return cast(int, (self._blocks[0].attn2.to_k if projection is None else projection.linear_1).in_features)

    @property
    def _has_sizes(self) -> bool:
        return bool(self._model.adaln_single.emb.use_additional_conditions)

    @property
    def _patch_size(self) -> int:
        return cast(int, self._model.pos_embed.proj.kernel_size[0])


def _bias_of(mask: Tensor | None, text: Tensor) -> Tensor:
    """What is added to scores (N, 1, L), as the model makes it of a mask."""
    if mask is None:
        return text.new_zeros(len(text), 1, text.shape[1])
    return mask.to(text.dtype) if mask.ndim == 3 else ((1 - mask.to(text.dtype)) * -10000.0).unsqueeze(1)
