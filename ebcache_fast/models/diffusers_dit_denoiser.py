"""diffusers' class-conditional DiT (``DiTTransformer2DModel``) seen as a ``Denoiser``, known by its attributes."""

from functools import cached_property
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ebcache_fast.errors import InputError
from ebcache_fast.models.denoiser import Modulation, Scratch
from ebcache_fast.models.dit import unpatchify
from ebcache_fast.models.dit_layout import check_layout, check_norms, shape_of
from ebcache_fast.models.layers import (
    is_plain,
    is_plain_patching,
    is_watched,
    linear_gelu,
    linear_into,
)
from ebcache_fast.operands import Linear, Patches
from ebcache_fast.ops import Operations
from ebcache_fast.plan import Branch, ModelShape

_EMB = "transformer_blocks.0.norm1.emb"
_LAYOUT = (
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
)


class DiffusersDiTDenoiser:
    """The parts of a DiTTransformer2DModel, read from the live module: every block embeds timestep and label itself.

    Frequencies and epsilons are the module's own; diffusers' defaults are not the original's. Raises InputError,
    naming the attribute, for a module that lacks one or whose LayerNorms have parameters, and for one that diffusers
    itself caches or casts layer by layer.
    """

    def __init__(self, model: nn.Module) -> None:
        check_layout(model, _LAYOUT, "diffusers' DiTTransformer2DModel")
        _refuse_other_ways(model)
        self._model = cast(Any, model)  # known by its attributes: there is no type to name
        self._blocks = list(self._model.transformer_blocks)
        of_layers = (
            f"transformer_blocks.{i}.{norm}" for i in range(len(self._blocks)) for norm in ("norm1.norm", "norm3")
        )
        check_norms(model, (*of_layers, "norm_out"))

    @cached_property
    def shape(self) -> ModelShape:
        block, depth = self._blocks[0], len(self._blocks)
        _, tokens, width = self._model.pos_embed.pos_embed.shape
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

    def weight(self) -> Tensor:
        return cast(Tensor, next(self._blocks[0].attn1.to_q.parameters()))

    def modulation(self, t: Tensor, y: Tensor, out: Modulation) -> None:
        steps, labels = len(t), len(y)
        pairs = t.repeat_interleave(labels), y.repeat(steps)  # (S * U,) each
        first = self._embedded(0, *pairs)  # the head has no embedders of its own
        for layer, block in enumerate(self._blocks):
            c = first if layer == 0 else self._embedded(layer, *pairs)  # (S * U, D)
            vectors = block.norm1.linear(block.norm1.silu(c)).view(steps, labels, 2, 3, -1)
            out.layers[:, layer] = vectors.permute(0, 2, 3, 1, 4)
        head = self._model.proj_out_1(F.silu(first)).view(steps, labels, 2, -1)
        out.head.copy_(head.transpose(1, 2))

    def _embedded(self, layer: int, t: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self._blocks[layer].norm1.emb(t, y, hidden_dtype=self.weight().dtype))

    def embed(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._model.pos_embed(x))

    def norm_eps(self, layer: int, branch: Branch) -> float:
        block = self._blocks[layer]
        return cast(float, (block.norm1.norm if branch is Branch.SELF_ATTN else block.norm3).eps)

    def run_branch(
        self, layer: int, branch: Branch, u: Tensor, out: Tensor, operations: Operations, scratch: Scratch
    ) -> None:
        block = self._blocks[layer]
        if branch is Branch.SELF_ATTN and _is_usual_attention(block.attn1):
            linear_into(block.attn1.to_out[0], _attend(block.attn1, u, operations, scratch), out)
        elif branch is Branch.MLP and _is_usual_feed_forward(block.ff):
            gelu, _, linear = block.ff.net
            widened = linear_gelu(gelu.proj, u, operations, scratch)
            linear_into(linear, gelu(u) if widened is None else widened, out)
        else:
            out.copy_((block.attn1 if branch is Branch.SELF_ATTN else block.ff)(u))

    def passed_over_hooks(self) -> str | None:
        of_a_layer = ("", ".norm1", ".norm1.norm", ".norm3")
        of_layers = (f"transformer_blocks.{i}{name}" for i in range(len(self._blocks)) for name in of_a_layer)
        passed_over = ("transformer_blocks", "norm_out", *of_layers)
        return next((path for path in passed_over if is_watched(attrgetter(path)(self._model))), None)

    def foreign_layer(self) -> str | None:
        ends = () if self.has_plain_ends else ("pos_embed", "proj_out_2")
        called = (f"transformer_blocks.{i}.{name}" for i in range(len(self._blocks)) for name in ("attn1", "ff"))
        for path in (*ends, *called):
            for name, module in attrgetter(path)(self._model).named_modules(prefix=path):
                if not _is_known(module) or not _is_known(getattr(module, "processor", module)):
                    return cast(str, name)
        return None

    @property
    def has_plain_ends(self) -> bool:
        embed, linear = self._model.pos_embed, self._model.proj_out_2
        if not (is_plain(linear) and is_plain_patching(embed) and embed.flatten and embed.pos_embed_max_size is None):
            return False
        weights = self.weight(), embed.proj.weight, embed.pos_embed, linear.weight
        return len({weight.dtype for weight in weights}) == 1

    def patches(self) -> Patches:
        embed = self._model.pos_embed
        return Patches(embed.proj.weight, embed.proj.bias, embed.pos_embed[0])

    def head_linear(self) -> Linear:
        return Linear(self._model.proj_out_2.weight, self._model.proj_out_2.bias)

    @property
    def head_eps(self) -> float:
        return cast(float, self._model.norm_out.eps)

    def head(self, u: Tensor) -> Tensor:
        return unpatchify(self._model.proj_out_2(u), self._patch_size, self.out_channels)

    @property
    def out_channels(self) -> int:
        return cast(int, self._model.proj_out_2.out_features // self._patch_size**2)

    @property
    def _labels(self) -> int:
        return cast(int, self._blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings)

    @property
    def _patch_size(self) -> int:
        return cast(int, self._model.pos_embed.proj.kernel_size[0])


def _refuse_other_ways(model: nn.Module) -> None:
    """InputError where hooks of diffusers keep features from call to call, or weights in a dtype of their own."""
    for path, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        for name, hook in registry.hooks.items() if registry is not None else ():
            if hook._is_stateful or name == "layerwise_casting":
                whose = type(model).__name__ + (path and f".{path}")
                raise InputError(
                    f"{whose} has diffusers' hook {name!r}, and what it computes or keeps is not what its parts say; "
                    "remove diffusers' own caches and layerwise casting first"
                )


def _is_known(part: Any) -> bool:
    """Whether it is torch's or diffusers' own: their Python holds nothing that changes from call to call."""
    return type(part).__module__.startswith(("torch.nn.modules", "diffusers.models."))


def _is_usual_attention(attention: Any) -> bool:
    """Whether it is three projections, torch's attention and a projection; all else runs as the module it is."""
    additions = "group_norm", "spatial_norm", "norm_q", "norm_k", "residual_connection", "fused_projections"
    return (
        type(attention.processor).__name__ == "AttnProcessor2_0"
        and _is_known(attention.processor)
        and not any(getattr(attention, name, None) for name in additions)
        and attention.rescale_output_factor == 1
        and not any(map(is_watched, (attention, attention.to_out[1])))
    )


def _is_usual_feed_forward(feed_forward: Any) -> bool:
    """Whether it is a linear map, a tanh-GELU and a linear map."""
    net = feed_forward.net
    return (
        len(net) == 3
        and type(net[0]).__name__ == "GELU"
        and net[0].approximate == "tanh"
        and not any(map(is_watched, (feed_forward, *net[:2])))
    )


def _attend(attention: Any, u: Tensor, operations: Operations, scratch: Scratch) -> Tensor:
    """Self-attention before its output projection, (N, T, D) -> (N, T, D)."""
    n, tokens, width = u.shape
    projections = attention.to_q, attention.to_k, attention.to_v
    if operations.attention is None:
        q, k, v = (each(u).view(n, tokens, attention.heads, -1).transpose(1, 2) for each in projections)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
    packed = scratch.buffer("qkv", n, tokens, 3 * width)
    for each, part in zip(projections, packed.chunk(3, dim=2), strict=True):
        linear_into(each, u, part)
    out = scratch.buffer("attention", n, tokens, width)
    operations.attention(packed, attention.heads, out)
    return out
