"""diffusers' class-conditional DiT (``DiTTransformer2DModel``) seen as a ``Denoiser``, known by its attributes."""

import copy
from functools import cached_property
from typing import Self, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import BranchResources, BufferPool, Conditioning, Modulation
from ebcache_fast.models.diffusers_denoiser import DiffusersDenoiser, Layout
from ebcache_fast.models.diffusers_layers import feed_forward_into, positions_of, self_attention_into
from ebcache_fast.models.layers import PLAIN_TENSORS
from ebcache_fast.models.layout import LabelConditioned, shape_of
from ebcache_fast.models.modules import unpatchify
from ebcache_fast.ops.operands import Linear, Patches
from ebcache_fast.plan import Branch, ModelShape, Site

_EMB = "transformer_blocks.0.norm1.emb"
_LAYOUT = Layout(
    name="DiTTransformer2DModel",
    known_by=(
        "transformer_blocks.0.norm1.norm.eps",
        "transformer_blocks.0.norm3.eps",
        "norm_out.eps",
        "pos_embed.proj.kernel_size",
        "pos_embed.pos_embed.shape",
        f"{_EMB}.time_proj.num_channels",
        f"{_EMB}.timestep_embedder",
        f"{_EMB}.class_embedder.embedding_table.num_embeddings",
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn1.heads",
        "transformer_blocks.0.ff.net.2.in_features",
        "proj_out_1",
        "proj_out_2.out_features",
    ),
    norms=("norm_out",),
    block_norms=("norm1.norm", "norm3"),
    branches=("attn1", "ff"),
    embed_head=("pos_embed", "proj_out_2"),
    block_passed_over=("norm1",),
)


class DiffusersDiTDenoiser(DiffusersDenoiser, LabelConditioned):
    """The parts of a DiTTransformer2DModel, read from the live module: every block embeds timestep and label itself.

    Frequencies and epsilons are the module's own; diffusers' defaults are not the original's. Raises what
    `DiffusersDenoiser` does.
    """

    layout = _LAYOUT
    _reads_positions = True  # those of the size that it is configured for; the model makes others as they are needed

    @cached_property
    def shape(self) -> ModelShape:
        block, depth = self._blocks[0], len(self._blocks)
        width, tokens = self._width, self._tokens
        timestep = block.norm1.emb.time_proj.num_channels * width + width * width
        return shape_of(
            depth=depth,
            width=width,
            hidden=block.ff.net[2].in_features,
            heads=block.attn1.heads,
            tokens=tokens,
            patch_size=self._patch_size,
            channels=(self.latent_shape[0], self.out_channels),
            num_classes=self.num_classes,
            conditioning=(depth + 1) * timestep + (6 * depth + 2) * width * width,
        )

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        embed = self._model.pos_embed
        return embed.proj.in_channels, embed.height * self._patch_size, embed.width * self._patch_size

    @cached_property
    def num_classes(self) -> int:
        return self._labels - self.has_null_label

    @cached_property
    def has_null_label(self) -> bool:
        return self._labels > cast(int, self._blocks[0].norm1.emb.class_embedder.num_classes)

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        if tuple(latents) == self.latent_shape:
            return self
        channels, patch, (_, *sides) = self.latent_shape[0], self._patch_size, latents
        if latents[:1] != (channels,) or len(sides) != 2 or sides[0] != sides[1] or not sides[0] or sides[0] % patch:
            raise InputError(
                f"x of shape (rows, {', '.join(map(str, latents))}) does not fit; this model takes (rows, {channels}, "
                f"side, side), of which side is a multiple of {patch}"
            )
        for_shape = copy.copy(self)
        vars(for_shape).pop("shape", None)
        vars(for_shape).update(latent_shape=tuple(latents), _reads_positions=False)
        return for_shape

    def precompute(self, context: Conditioning, per_run: BufferPool) -> None:
        if not self._reads_positions:
            positions = positions_of(self._model.pos_embed, self.latent_shape)
            per_run.buffer("positions", *positions.shape).copy_(positions)

    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        steps, labels = len(t), len(y)
        pairs = t.repeat_interleave(labels), y.repeat(steps)  # (S * U,) each
        first = self._embedded(0, *pairs)  # the head has no embedders of its own
        layers = out.layers(2)
        for layer, block in enumerate(self._blocks):
            c = first if layer == 0 else self._embedded(layer, *pairs)  # (S * U, D)
            vectors = block.norm1.linear(block.norm1.silu(c)).view(steps, labels, 2, 3, -1)
            layers[:, layer] = vectors.permute(0, 2, 3, 1, 4)
        head = self._model.proj_out_1(F.silu(first)).view(steps, labels, 2, -1)
        out.head.copy_(head.transpose(1, 2))

    def _embedded(self, layer: int, t: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self._blocks[layer].norm1.emb(t, y, hidden_dtype=self.weight().dtype))

    def embed(self, x: Tensor, per_run: BufferPool) -> Tensor:
        return cast(Tensor, self._model.pos_embed(x))

    def norm(self, site: Site) -> nn.LayerNorm:
        block = self._blocks[site.layer]
        return cast(nn.LayerNorm, block.norm1.norm if site.branch is Branch.SELF_ATTN else block.norm3)

    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        block = self._blocks[site.layer]
        if site.branch is Branch.SELF_ATTN:
            self_attention_into(block.attn1, u, out, res)
        else:
            feed_forward_into(block.ff, u, out, res)

    @property
    def has_plain_embed_head(self) -> bool:
        positions = self._model.pos_embed.pos_embed  # read as they are
        can_be_read = type(positions) in PLAIN_TENSORS and positions.dtype == self.weight().dtype
        return super().has_plain_embed_head and (can_be_read or not self._reads_positions)

    def patches(self, per_run: BufferPool) -> Patches:
        embed = self._model.pos_embed
        own, size = self._reads_positions, (self._tokens, self._width)
        positions = embed.pos_embed[0] if own else per_run.buffer("positions", *size)
        return Patches(embed.proj.weight, embed.proj.bias, positions)

    def head_linear(self) -> Linear:
        return Linear(self._model.proj_out_2.weight, self._model.proj_out_2.bias)

    @property
    def head_norm(self) -> nn.LayerNorm:
        return cast(nn.LayerNorm, self._model.norm_out)

    def head(self, u: Tensor) -> Tensor:
        return unpatchify(self._model.proj_out_2(u), self._patch_size, self.out_channels)

    @property
    def out_channels(self) -> int:
        return cast(int, self._model.proj_out_2.out_features // self._patch_size**2)

    @property
    def _width(self) -> int:
        return cast(int, self._model.pos_embed.pos_embed.shape[2])

    @property
    def _tokens(self) -> int:
        return (self.latent_shape[1] // self._patch_size) * (self.latent_shape[2] // self._patch_size)

    @property
    def _labels(self) -> int:
        return cast(int, self._blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings)

    @property
    def _patch_size(self) -> int:
        return cast(int, self._model.pos_embed.proj.kernel_size[0])
