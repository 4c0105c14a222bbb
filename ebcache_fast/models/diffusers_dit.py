"""diffusers' class-conditional DiT (``DiTTransformer2DModel``) as a `Family`."""

from functools import cached_property
from typing import Self, cast

from torch import Tensor
from torch.nn import functional as F

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import POSITIONS, BranchResources, BufferPool, Conditioning, Modulation
from ebcache_fast.models.diffusers_layers import (
    DiffusersFamily,
    feed_forward_into,
    latents_of,
    positions_of,
    self_attention_into,
)
from ebcache_fast.models.layout import Layout, mlp, self_attention
from ebcache_fast.plan import Branch, ModelShape, Site


class DiffusersDiTDenoiser(DiffusersFamily):
    """diffusers' DiT: the original's layers, each of which embeds timestep and label itself.

    Frequencies and epsilons are the module's own; diffusers' defaults are not the original's. Raises what
    `DiffusersFamily` does.
    """

    layout = Layout(
        name="diffusers' DiTTransformer2DModel",
        blocks="transformer_blocks",
        norms={Branch.SELF_ATTN: ".norm1.norm", Branch.MLP: ".norm3"},
        called=(".attn1", ".ff"),
        dtype_of=".attn1.to_q",
        embedding="pos_embed",
        head_norm="norm_out",
        head="proj_out_2",
        known_by=(
            "pos_embed.proj.kernel_size",
            "pos_embed.pos_embed.shape",
            ".norm1.emb.time_proj.num_channels",
            ".norm1.emb.timestep_embedder",
            ".norm1.emb.class_embedder.embedding_table.num_embeddings",
            ".norm1.linear",
            ".attn1.heads",
            ".ff.net.2.in_features",
            "proj_out_1",
        ),
        passed_over=(".norm1",),
    )
    _has_own_size = True  # the size that the model has positions of; it makes others as they are needed

    @cached_property
    def shape(self) -> ModelShape:
        block, depth, tokens = self._blocks[0], len(self._blocks), self.latent_tokens
        width, hidden = self.width, block.ff.net[2].in_features
        timestep = block.norm1.emb.time_proj.num_channels * width + width * width
        return self._shape_of(
            (self_attention(width, tokens), mlp(width, hidden, tokens)),
            conditioning=(depth + 1) * timestep + (6 * depth + 2) * width * width,
            mlp_hidden_size=hidden,
            num_heads=block.attn1.heads,
            tokens=tokens,
            num_classes=self.num_classes,
        )

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        return latents_of(self._model.pos_embed)

    @cached_property
    def num_classes(self) -> int:
        return self._labels - self.has_null_label

    @cached_property
    def has_null_label(self) -> bool:
        return self._labels > cast(int, self._blocks[0].norm1.emb.class_embedder.num_classes)

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        if tuple(latents) == self.latent_shape:
            return self
        self._check_latents(latents, self.latent_shape[0])
        if latents[1] != latents[2]:
            raise InputError(f"x of height {latents[1]} and width {latents[2]} does not fit; this model takes squares")
        return self._resized(latent_shape=tuple(latents), _has_own_size=False)

    def precompute(self, context: Conditioning, per_run: BufferPool) -> None:
        if not self._has_own_size:
            positions = positions_of(self._model.pos_embed, self.latent_shape)
            per_run.buffer(POSITIONS, *positions.shape).copy_(positions)

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

    def read_positions(self) -> Tensor | None:
        return cast(Tensor, self._model.pos_embed.pos_embed[0]) if self._has_own_size else None

    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        block = self._blocks[site.layer]
        if site.branch is Branch.SELF_ATTN:
            self_attention_into(block.attn1, u, out, res)
        else:
            feed_forward_into(block.ff, u, out, res)

    @property
    def _labels(self) -> int:
        return cast(int, self._blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings)
