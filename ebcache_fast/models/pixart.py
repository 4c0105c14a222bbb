"""diffusers' PixArt (``PixArtTransformer2DModel``, Alpha and Sigma) seen as a ``Denoiser``, known by its attributes."""

from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from ebcache_fast.models.base import BranchResources, BufferPool, Conditioning, Modulation
from ebcache_fast.models.diffusers_layers import (
    attend,
    feed_forward_into,
    heads_of,
    is_usual_attention,
    positions_of,
    self_attention_into,
)
from ebcache_fast.models.layers import linear_into
from ebcache_fast.models.layout import cross_attention, mlp, self_attention
from ebcache_fast.models.pixart_sizes import PixArtConditioning, PixArtSizes
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Linear, Patches
from ebcache_fast.plan import Branch, ModelShape, Site, repeated


class PixArtDenoiser(PixArtSizes):
    """The parts of a PixArtTransformer2DModel, read from the live module.

    Every layer is self-attention, cross-attention to the text, which takes the stream as it is and has no gate, and an
    MLP (Chen et al., arXiv 2310.00426, section 2.3). Keys and values of the text are computed once for a run. Raises
    what `DiffusersDenoiser` does.
    """

    @cached_property
    def shape(self) -> ModelShape:
        block, depth, width = self._blocks[0], len(self._blocks), self.width
        hidden, tokens, square = block.ff.net[2].in_features, self.tokens, width * width
        embed_head = self.patch_size**2 * (self.latent_shape[0] + self.out_channels) * width
        timestep = 256 * width + 7 * square  # two layers that embed it, of 256 frequencies, and one to six vectors
        return ModelShape(
            width=width,
            tokens=tokens,
            site_shapes=repeated(
                depth,
                (
                    self_attention(width, tokens),
                    cross_attention(width, tokens, self.text),
                    mlp(width, hidden, tokens),
                ),
            ),
            fixed_macs=timestep + embed_head * tokens,
            fixed_weights=timestep + embed_head,
            sizes=(
                ("depth", depth),
                ("hidden_size", width),
                ("mlp_hidden_size", hidden),
                ("num_heads", block.attn1.heads),
                ("patch_size", self.patch_size),
                ("in_channels", self.latent_shape[0]),
                ("out_channels", self.out_channels),
                ("text_size", self.text_width),
            ),
        )

    def conditions(self, labels: Tensor) -> Tensor:
        return torch.arange(len(labels), device=labels.device) if self.has_sizes else torch.zeros_like(labels)

    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        given, steps, rows = cast(PixArtConditioning, context), len(t), len(y)
        single = self._model.adaln_single
        sizes = (
            None if one is None or not self.has_sizes else one[y].repeat(steps, 1)
            for one in (given.resolution, given.aspect_ratio)
        )
        embedded = single.emb(t.repeat_interleave(rows), *sizes, steps * rows, self.weight().dtype)  # (S * U, D)
        shared = single.linear(single.silu(embedded)).view(steps, rows, 6, -1)
        layers = out.layers(3)
        for layer, block in enumerate(self._blocks):
            vectors = (shared + block.scale_shift_table).view(steps, rows, 2, 3, -1).permute(0, 2, 3, 1, 4)
            of_layer = layers[:, layer]  # (S, 3, 3, U, D)
            of_layer[:, 0::2] = vectors
            of_layer[:, 1] = 1.0  # of cross-attention the gate alone is read
        head = embedded.view(steps, rows, 1, -1) + self._model.scale_shift_table
        out.head.copy_(head.transpose(1, 2))

    def precompute(self, context: Conditioning, per_run: BufferPool) -> None:
        given = cast(PixArtConditioning, context)
        projection = self._model.caption_projection
        text = given.text.to(self.weight().dtype)
        text = text if projection is None else projection(text)  # (N, L, C), where C is D if it is projected
        rows, length, _ = text.shape
        per_run.buffer("caption", *text.shape).copy_(text)
        per_run.buffer("bias", rows, 1, length).copy_(_bias_of(given.mask, text))
        for layer, block in enumerate(self._blocks):
            kept = per_run.buffer(f"keys and values {layer}", 2, rows, length, self.width)
            linear_into(block.attn2.to_k, text, kept[0])
            linear_into(block.attn2.to_v, text, kept[1])
        per_run.buffer("positions", self.tokens, self.width).copy_(
            positions_of(self._model.pos_embed, self.latent_shape)
        )

    def embed(self, x: Tensor, per_run: BufferPool) -> Tensor:
        return cast(Tensor, self._model.pos_embed(x))

    def final(self, h: Tensor) -> Tensor:
        return h

    def norm(self, site: Site) -> nn.LayerNorm | None:
        block = self._blocks[site.layer]
        return {Branch.SELF_ATTN: block.norm1, Branch.MLP: block.norm2}.get(site.branch)

    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        block = self._blocks[site.layer]
        if site.branch is Branch.SELF_ATTN:
            self_attention_into(block.attn1, u, out, res)
        elif site.branch is Branch.CROSS_ATTN:
            self._cross_attention_into(site.layer, u, out, res)
        else:
            feed_forward_into(block.ff, u, out, res)

    def _cross_attention_into(self, layer: int, u: Tensor, out: Tensor, res: BranchResources) -> None:
        attention, rows = self._blocks[layer].attn2, len(u)
        bias = res.per_run.buffer("bias", rows, 1, self.text)
        if not is_usual_attention(attention):
            caption = res.per_run.buffer("caption", rows, self.text, self.caption_width)
            out.copy_(attention(u, encoder_hidden_states=caption, attention_mask=bias))
            return
        k, v = res.per_run.buffer(f"keys and values {layer}", 2, rows, self.text, self.width)
        q, k, v = (heads_of(attention, each) for each in (attention.to_q(u), k, v))
        linear_into(attention.to_out[0], attend(q, k, v, bias.unsqueeze(1)), out)

    def patches(self, per_run: BufferPool) -> Patches:
        proj = self._model.pos_embed.proj
        return Patches(proj.weight, proj.bias, per_run.buffer("positions", self.tokens, self.width))

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
        return cast(int, self._model.proj_out.out_features // self.patch_size**2)


def _bias_of(mask: Tensor | None, text: Tensor) -> Tensor:
    """What is added to scores (N, 1, L), as the model makes it of a mask."""
    if mask is None:
        return text.new_zeros(len(text), 1, text.shape[1])
    return mask.to(text.dtype) if mask.ndim == 3 else ((1 - mask.to(text.dtype)) * -10000.0).unsqueeze(1)
