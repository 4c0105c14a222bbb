"""The original DiT (``ebcache_fast.models.modules.DiT``), or any module of its layout, as a `Family`."""

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn

from ebcache_fast.models.base import BranchResources, BufferPool, Conditioning, Family, Modulation
from ebcache_fast.models.embeddings import FREQUENCY_SIZE, timestep_embedding
from ebcache_fast.models.layers import is_watched, linear_into
from ebcache_fast.models.layout import Layout, mlp, self_attention
from ebcache_fast.plan import Branch, ModelShape, Site


class DiTDenoiser(Family):
    """The original DiT: each layer is gated self-attention and a gated MLP, modulated by timestep and label.

    Source: Peebles and Xie, arXiv 2212.09748, adaLN-Zero. Raises what `Family` does.
    """

    layout = Layout(
        name="the original DiT",
        blocks="blocks",
        norms={Branch.SELF_ATTN: ".norm1", Branch.MLP: ".norm2"},
        called=(".attn.qkv", ".attn.proj", ".mlp.fc1", ".mlp.act", ".mlp.fc2"),
        may_lack=(".attn.q_norm", ".attn.k_norm"),
        dtype_of=".attn.qkv",
        embedding="x_embedder",
        head_norm="final_layer.norm_final",
        head="final_layer.linear",
        known_by=(
            "x_embedder.proj.in_channels",
            "pos_embed",
            "t_embedder.mlp",
            "y_embedder.embedding_table.num_embeddings",
            ".attn.qkv.in_features",
            ".attn.num_heads",
            ".mlp.fc1.out_features",
            ".adaLN_modulation",
            "final_layer.adaLN_modulation",
        ),
        read=("pos_embed",),
        passed_over=("t_embedder", "y_embedder", "final_layer", ".attn", ".mlp"),
    )

    @cached_property
    def shape(self) -> ModelShape:
        block, depth, tokens = self._blocks[0], len(self._blocks), self.latent_tokens
        width, hidden = self.width, block.mlp.fc1.out_features
        return self._shape_of(
            (self_attention(width, tokens), mlp(width, hidden, tokens)),
            conditioning=FREQUENCY_SIZE * width + (6 * depth + 3) * width * width,
            mlp_hidden_size=hidden,
            num_heads=block.attn.num_heads,
            tokens=tokens,
            num_classes=self.num_classes,
        )

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        side = math.isqrt(self._model.pos_embed.shape[1]) * self.patch[0]
        return self._model.x_embedder.proj.in_channels, side, side

    @cached_property
    def num_classes(self) -> int:
        return self._labels - self.has_null_label

    @cached_property
    def has_null_label(self) -> bool:
        # The original embeds one label more than it has classes, exactly when it trains with label dropout.
        declared = getattr(self._model.y_embedder, "num_classes", self._labels - 1)
        return self._labels > declared

    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        model, steps, labels = self._model, len(t), len(y)
        weight = self.weight()
        timesteps = model.t_embedder.mlp(timestep_embedding(t, dtype=weight.dtype))  # (S, D)
        conditions = model.y_embedder.embedding_table(y)  # (U, D)
        c = (timesteps.unsqueeze(1) + conditions).flatten(0, 1)  # (S * U, D)
        layers = out.layers(2)
        for layer, block in enumerate(self._blocks):
            vectors = block.adaLN_modulation(c).view(steps, labels, 2, 3, -1)
            layers[:, layer] = vectors.permute(0, 2, 3, 1, 4)
        head = model.final_layer.adaLN_modulation(c).view(steps, labels, 2, -1)
        out.head.copy_(head.transpose(1, 2))

    def embed(self, x: Tensor, per_run: BufferPool) -> Tensor:
        return cast(Tensor, self._model.x_embedder(x) + self._model.pos_embed)

    def read_positions(self) -> Tensor:
        return cast(Tensor, self._model.pos_embed[0])

    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        block = self._blocks[site.layer]
        if site.branch is Branch.SELF_ATTN:
            linear_into(block.attn.proj, attend(block.attn, block.attn.qkv(u), res), out)
        else:
            linear_into(block.mlp.fc2, _widen(block.mlp, u, res), out)

    def first_layers(self) -> Iterator[nn.Module]:
        """The linear layers that branches begin with."""
        return chain.from_iterable((block.attn.qkv, block.mlp.fc1) for block in self._blocks)

    @property
    def _labels(self) -> int:
        return cast(int, self._model.y_embedder.embedding_table.num_embeddings)


def attend(attention: Any, qkv: Tensor, res: BranchResources) -> Tensor:
    """Self-attention before its output projection, of projections (N, T, 3 * D) -> (N, T, D)."""
    n, tokens, width = *qkv.shape[:2], qkv.shape[2] // 3
    heads = attention.num_heads
    has_norms = hasattr(attention, "q_norm")  # timm's: identities in the original
    if res.operations.attention is not None and not has_norms and not res.window:
        out = res.scratch.buffer("attention", n, tokens, width)
        res.operations.attention(qkv, heads, out)
        return out
    q, k, v = qkv.view(n, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    if has_norms:
        q, k = attention.q_norm(q), attention.k_norm(k)  # (N, heads, T, D / heads), as v
    return res.attend(q, k, v).transpose(1, 2).reshape(n, tokens, width)


def _widen(mlp: Any, u: Tensor, res: BranchResources) -> Tensor:
    """The MLP up to its last linear layer, (N, T, D) -> (N, T, F)."""
    is_tanh_gelu = type(mlp.act) is nn.GELU and mlp.act.approximate == "tanh" and not is_watched(mlp.act)
    fused = res.linear_gelu(mlp.fc1, u) if is_tanh_gelu else None
    return cast(Tensor, mlp.act(mlp.fc1(u))) if fused is None else fused
