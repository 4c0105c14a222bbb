"""Any module of the original DiT's layout, seen as a ``Denoiser``: known by its attributes, not its class."""

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn

from ebcache_fast.models.base import BranchResources, BufferPool, Conditioning, Modulation
from ebcache_fast.models.embeddings import FREQUENCY_SIZE, timestep_embedding
from ebcache_fast.models.layers import (
    are_plain_embed_head,
    has,
    is_torchs_own,
    is_watched,
    linear_gelu,
    linear_into,
    walk,
    weight_of,
)
from ebcache_fast.models.layout import LabelConditioned, check_layout, check_norms, check_plain, shape_of
from ebcache_fast.models.modules import unpatchify
from ebcache_fast.ops.operands import Linear, Patches
from ebcache_fast.plan import Branch, ModelShape, Site

_LAYOUT = (
    "blocks.0.norm1.eps",
    "blocks.0.norm2.eps",
    "final_layer.norm_final.eps",
    "x_embedder.proj.weight",
    "x_embedder.proj.in_channels",
    "x_embedder.proj.kernel_size",
    "pos_embed",
    "t_embedder.mlp",
    "y_embedder.embedding_table.num_embeddings",
    "blocks.0.attn.qkv.in_features",
    "blocks.0.attn.proj",
    "blocks.0.attn.num_heads",
    "blocks.0.mlp.fc1.out_features",
    "blocks.0.mlp.act",
    "blocks.0.mlp.fc2",
    "blocks.0.adaLN_modulation",
    "final_layer.linear.out_features",
    "final_layer.adaLN_modulation",
)


class DiTDenoiser(LabelConditioned):
    """The parts of a DiT (``ebcache_fast.models.modules.DiT``, or the original's), read from the live module.

    Raises InputError, naming the attribute, for a module that lacks one or has other norms.
    """

    def __init__(self, model: nn.Module) -> None:
        check_layout(model, _LAYOUT, "the original DiT (as ebcache_fast.models.modules.DiT)")
        self._model = cast(Any, model)  # known by its attributes: there is no type to name
        self._blocks = list(self._model.blocks)
        of_layers = (f"blocks.{i}.{norm}" for i in range(len(self._blocks)) for norm in ("norm1", "norm2"))
        check_norms(model, (*of_layers, "final_layer.norm_final"))
        check_plain(model, ("pos_embed",))

    @cached_property
    def shape(self) -> ModelShape:
        model, block, depth = self._model, self._blocks[0], len(self._blocks)
        width = block.attn.qkv.in_features
        timestep = FREQUENCY_SIZE * width + width * width
        return shape_of(
            depth=depth,
            width=width,
            hidden=block.mlp.fc1.out_features,
            heads=block.attn.num_heads,
            tokens=model.pos_embed.shape[1],
            patch_size=self._patch_size,
            channels=(self.latent_shape[0], self.out_channels),
            num_classes=self.num_classes,
            conditioning=timestep + (6 * depth + 2) * width * width,
        )

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        side = math.isqrt(self._model.pos_embed.shape[1]) * self._patch_size
        return self._model.x_embedder.proj.in_channels, side, side

    @cached_property
    def num_classes(self) -> int:
        return self._labels - self.has_null_label

    @cached_property
    def has_null_label(self) -> bool:
        # The original embeds one label more than it has classes, exactly when it trains with label dropout.
        declared = getattr(self._model.y_embedder, "num_classes", self._labels - 1)
        return self._labels > declared

    def weight(self) -> Tensor:
        return weight_of(self._blocks[0].attn.qkv)  # an adapter around it need not have a weight

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

    def norm(self, site: Site) -> nn.LayerNorm:
        block = self._blocks[site.layer]
        return cast(nn.LayerNorm, block.norm1 if site.branch is Branch.SELF_ATTN else block.norm2)

    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        block = self._blocks[site.layer]
        if site.branch is Branch.SELF_ATTN:
            linear_into(block.attn.proj, attend(block.attn, block.attn.qkv(u), res), out)
        else:
            linear_into(block.mlp.fc2, _widen(block.mlp, u, res), out)

    def first_layers(self) -> Iterator[nn.Module]:
        """The linear layers that branches begin with."""
        return chain.from_iterable((block.attn.qkv, block.mlp.fc1) for block in self._blocks)

    def passed_over_hooks(self) -> str | None:
        of_the_whole = ("t_embedder", "y_embedder", "blocks", "final_layer", "final_layer.norm_final")
        of_a_layer = ("", ".norm1", ".attn", ".norm2", ".mlp")
        of_layers = (f"blocks.{i}{name}" for i in range(len(self._blocks)) for name in of_a_layer)
        return next((path for path in (*of_the_whole, *of_layers) if is_watched(attrgetter(path)(self._model))), None)

    def foreign_layer(self) -> str | None:
        embed_head = () if self.has_plain_embed_head else ("x_embedder", "final_layer.linear")
        called = (*(f"attn.{name}" for name in ("qkv", "proj", "q_norm", "k_norm")), "mlp.fc1", "mlp.act", "mlp.fc2")
        of_layers = (f"blocks.{i}.{name}" for i in range(len(self._blocks)) for name in called)
        there = ((path, attrgetter(path)(self._model)) for path in (*embed_head, *of_layers) if has(self._model, path))
        return next((path for path, layer in there if not all(is_torchs_own(one) for _, one in walk(layer))), None)

    @property
    def has_plain_embed_head(self) -> bool:
        model = self._model
        return are_plain_embed_head(model.x_embedder, model.final_layer.linear, self.weight(), model.pos_embed)

    def patches(self, per_run: BufferPool) -> Patches:
        proj = self._model.x_embedder.proj
        return Patches(proj.weight, proj.bias, self._model.pos_embed[0])

    def head_linear(self) -> Linear:
        linear = self._model.final_layer.linear
        return Linear(linear.weight, linear.bias)

    @property
    def head_norm(self) -> nn.LayerNorm:
        return cast(nn.LayerNorm, self._model.final_layer.norm_final)

    def head(self, u: Tensor) -> Tensor:
        return unpatchify(self._model.final_layer.linear(u), self._patch_size, self.out_channels)

    @property
    def out_channels(self) -> int:
        return cast(int, self._model.final_layer.linear.out_features // self._patch_size**2)

    @property
    def _labels(self) -> int:
        return cast(int, self._model.y_embedder.embedding_table.num_embeddings)

    @property
    def _patch_size(self) -> int:
        return cast(int, self._model.x_embedder.proj.kernel_size[0])


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
    fused = linear_gelu(mlp.fc1, u, res) if is_tanh_gelu else None
    return cast(Tensor, mlp.act(mlp.fc1(u))) if fused is None else fused
