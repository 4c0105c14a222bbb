"""diffusers' CogVideoX (``CogVideoXTransformer3DModel``) seen as a ``Denoiser``, known by its attributes."""

import copy
import math
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.denoiser import TEXT, Context, Means, Modulation, Scratch
from ebcache_fast.models.diffusers_layers import (
    attend,
    feed_forward_into,
    first_foreign,
    heads_of,
    is_usual_attention,
    refuse_other_ways,
)
from ebcache_fast.models.dit_layout import check_layout, check_norms
from ebcache_fast.models.layers import is_plain, is_plain_patching, is_watched, linear_into
from ebcache_fast.operands import Linear, Patches
from ebcache_fast.plan import Branch, BranchShape, ModelShape

_LAYOUT = (
    "transformer_blocks.0.norm1.norm.eps",
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.attn1.heads",
    "transformer_blocks.0.norm2.norm.eps",
    "transformer_blocks.0.ff.net.2.in_features",
    "patch_embed.proj.bias",
    "patch_embed.text_proj.in_features",
    "patch_embed.patch_size",
    "patch_embed.max_text_seq_length",
    "time_proj",
    "time_embedding",
    "ofs_embedding",
    "norm_final.eps",
    "norm_out.norm.eps",
    "norm_out.linear",
    "proj_out.out_features",
)
_TEXT, _VIDEO = 0, 1  # the two conditions that tokens have


class CogVideoXContext(NamedTuple):
    """What a call gives besides latents and timesteps."""

    text: Tensor  # (N, L, E), as the text encoder gives it
    cos: Tensor | None = None  # (T - L, D / heads), of rotary embeddings, and
    sin: Tensor | None = None
    ofs: Tensor | None = None  # (1,) or (), of models that take it

    def rows(self, chosen: Tensor) -> "CogVideoXContext":
        """Of these rows (M,), in this order."""
        return self._replace(text=self.text[chosen])


class CogVideoXDenoiser:
    """The parts of a CogVideoXTransformer3DModel, read from the live module.

    Text and video are one stream, text first, with norms and gates of their own in every layer, and one attention over
    both (Yang et al., arXiv 2408.06072, section 2.2). Only video tokens have a head. Raises InputError, naming the
    attribute, for a module that lacks one or has other norms, and for one that diffusers itself caches or casts layer
    by layer.
    """

    num_classes, has_null_label = 1, True  # rows differ by their text alone

    def __init__(self, model: nn.Module) -> None:
        check_layout(model, _LAYOUT, "diffusers' CogVideoXTransformer3DModel")
        refuse_other_ways(model)
        self._model = cast(Any, model)  # known by its attributes: there is no type to name
        self._blocks = list(self._model.transformer_blocks)
        of_layers = (f"transformer_blocks.{i}.norm{k}.norm" for i in range(len(self._blocks)) for k in (1, 2))
        check_norms(model, (*of_layers, "norm_final", "norm_out.norm"))
        self._embed = embed = self._model.patch_embed
        frames = (embed.sample_frames - 1) // embed.temporal_compression_ratio + 1
        self.latent_shape: tuple[int, ...] = (self._in_channels, frames, embed.sample_height, embed.sample_width)
        self.text_tokens: int = embed.max_text_seq_length
        self._rows, self._rotates = 1, False  # of the text, and whether the attention does

    def sized(self, latents: tuple[int, ...], context: Context) -> Self:
        given = cast(CogVideoXContext, context)
        if len(latents) != 4 or latents[0] != self._in_channels or _leaves_a_rest(latents[1:], self._patch):
            raise InputError(
                f"latents of (channels, frames, height, width) {tuple(latents)} do not fit; this model takes "
                f"{self._in_channels} channels, and multiples of {self._patch} of the others"
            )
        text = given.text
        if text.ndim != 3 or text.shape[2] != self._embed.text_proj.in_features or not text.shape[1]:
            raise InputError(
                f"text of shape {tuple(text.shape)} does not fit; this model takes (rows, tokens, "
                f"{self._embed.text_proj.in_features})"
            )
        sized = copy.copy(self)
        vars(sized).pop("shape", None)
        sized.latent_shape, sized._rotates = tuple(latents), given.cos is not None
        sized._rows, sized.text_tokens = text.shape[:2]
        sized._check_positions(given)
        return sized

    def _check_positions(self, given: CogVideoXContext) -> None:
        embed, table = self._embed, (self._video_tokens, self._head_width)
        if self._adds_positions and self.text_tokens != embed.max_text_seq_length:
            raise InputError(
                f"text of {self.text_tokens} tokens does not fit the model's positions; pad it to "
                f"{embed.max_text_seq_length}"
            )
        learned = embed.sample_height, embed.sample_width
        if embed.use_learned_positional_embeddings and self.latent_shape[2:] != learned:
            raise InputError(
                f"height and width {self.latent_shape[2:]} do not fit the model's learned positions; they must be "
                f"{learned}"
            )
        shapes = {None if one is None else tuple(one.shape) for one in (given.cos, given.sin)}
        if shapes not in ({None}, {table}):
            raise InputError(f"rotary embeddings of shape {shapes} do not fit; they are two of {table}, or None")
        if (given.ofs is None) != (self._model.ofs_embedding is None):
            raise InputError(f"ofs={given.ofs} does not fit; pass one number to a model that takes it, None to others")

    def example(self, rows: int) -> tuple[tuple[int, ...], Context]:
        weight, embed = self.weight(), self._embed
        depth, height, width = self._patch
        frames, sides = 2 * depth, (height, 2 * width)
        if embed.use_learned_positional_embeddings:
            frames, *sides = self.latent_shape[1:]  # type: ignore[assignment]
        generator = torch.Generator("cpu").manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cpu").to(weight)

        text = draw(rows, embed.max_text_seq_length, embed.text_proj.in_features)
        ofs = None if self._model.ofs_embedding is None else weight.new_full((1,), 2.0)
        video = frames * sides[0] * sides[1] // (depth * height * width)
        context = CogVideoXContext(text, ofs=ofs)
        if not self._embed.use_positional_embeddings:
            angles = draw(video, self._head_width).float()
            context = context._replace(cos=angles.cos(), sin=angles.sin())
        return (self._in_channels, frames, *sides), context

    @cached_property
    def shape(self) -> ModelShape:
        block, depth, width = self._blocks[0], len(self._blocks), self._width
        hidden, square = block.ff.net[2].in_features, width * width
        tokens = self.text_tokens + self._video_tokens
        embedded = block.norm1.linear.in_features
        timestep = (width + embedded + (12 * depth + 2) * width) * embedded
        ends = width * (self._in_channels + self.out_channels) * math.prod(self._patch)
        return ModelShape(
            depth=depth,
            width=width,
            tokens=tokens,
            branches=(
                BranchShape(Branch.SELF_ATTN, 4 * square * tokens + 2 * tokens * tokens * width, 4 * square),
                BranchShape(Branch.MLP, 2 * width * hidden * tokens, 2 * width * hidden),
            ),
            fixed_macs=timestep + ends * self._video_tokens,
            fixed_weights=timestep + ends,
            fingerprint=(
                ("depth", depth),
                ("hidden_size", width),
                ("mlp_hidden_size", hidden),
                ("num_heads", block.attn1.heads),
                ("patch_size", self._patch[1]),
                ("in_channels", self._in_channels),
                ("out_channels", self.out_channels),
                ("text_size", self._embed.text_proj.in_features),
            ),
        )

    def weight(self) -> Tensor:
        return cast(Tensor, next(self._blocks[0].attn1.to_q.parameters()))

    def conditions(self, labels: Tensor) -> Tensor:
        of_a_row = torch.full((self.text_tokens + self._video_tokens,), _VIDEO, device=labels.device)
        of_a_row[: self.text_tokens] = _TEXT
        return of_a_row.repeat(len(labels))

    def modulation(self, t: Tensor, y: Tensor, context: Context, out: Modulation) -> None:
        model, given, dtype = self._model, cast(CogVideoXContext, context), self.weight().dtype
        c = model.time_embedding(model.time_proj(t).to(dtype))  # (S, E)
        if given.ofs is not None:
            c = c + model.ofs_embedding(model.ofs_proj(given.ofs.reshape(1)).to(dtype))
        for layer, block in enumerate(self._blocks):
            for branch, norm in enumerate((block.norm1, block.norm2)):
                vectors = norm.linear(norm.silu(c)).view(len(t), 2, 3, -1).flip(1)  # of text, of video
                out.layers[:, layer, branch] = vectors[:, y].transpose(1, 2)
        head = model.norm_out.linear(model.norm_out.silu(c)).view(len(t), 2, 1, -1)
        out.head.copy_(head.expand(-1, -1, len(y), -1))

    def prepare(self, context: Context, constants: Scratch) -> None:
        given = cast(CogVideoXContext, context)
        text, positions = given.text.to(self.weight().dtype), self._positions()
        constants.buffer("embeddings", *text.shape).copy_(text)
        tokens = constants.buffer(TEXT, len(text), self.text_tokens, self._width)
        torch.add(self._embed.text_proj(text), positions[: self.text_tokens].to(text.dtype), out=tokens)
        constants.buffer("positions", self._video_tokens, self._width).copy_(positions[self.text_tokens :])
        if (rotary := self._rotary(constants)) is not None and given.cos is not None and given.sin is not None:
            rotary[0].copy_(given.cos)
            rotary[1].copy_(given.sin)

    def embed(self, x: Tensor, constants: Scratch) -> Tensor:
        text = constants.buffer("embeddings", self._rows, self.text_tokens, self._embed.text_proj.in_features)
        video = x.repeat(self._rows // len(x), 1, 1, 1, 1).transpose(1, 2)
        return cast(Tensor, self._embed(text, video))

    def final(self, h: Tensor) -> Tensor:
        return cast(Tensor, self._model.norm_final(h[:, self.text_tokens :])).contiguous()

    def norm(self, layer: int, branch: Branch) -> nn.LayerNorm:
        block = self._blocks[layer]
        return cast(nn.LayerNorm, (block.norm1 if branch is Branch.SELF_ATTN else block.norm2).norm)

    def run_branch(self, layer: int, branch: Branch, u: Tensor, out: Tensor, means: Means) -> None:
        block = self._blocks[layer]
        if branch is Branch.MLP:
            feed_forward_into(block.ff, u, out, means)
        elif is_usual_attention(block.attn1, "CogVideoXAttnProcessor2_0", also=("norm_q", "norm_k")):
            linear_into(block.attn1.to_out[0], self._attend(block.attn1, u, means.constants), out)
        else:
            text, video = u[:, : self.text_tokens], u[:, self.text_tokens :]
            rotary = self._rotary(means.constants)
            video, text = block.attn1(video, encoder_hidden_states=text, image_rotary_emb=rotary)
            torch.cat([text, video], dim=1, out=out)

    def _attend(self, attention: Any, u: Tensor, constants: Scratch) -> Tensor:
        """Attention over text and video before its output projection, (N, T, D) -> (N, T, D)."""
        q, k, v = (heads_of(attention, each(u)) for each in (attention.to_q, attention.to_k, attention.to_v))
        q = q if attention.norm_q is None else attention.norm_q(q)
        k = k if attention.norm_k is None else attention.norm_k(k)
        rotary = self._rotary(constants)
        if rotary is not None:
            q, k = (_rotated(each, rotary, self.text_tokens) for each in (q, k))
        return attend(q, k, v)

    def passed_over_hooks(self) -> str | None:
        of_a_layer = ("", ".norm1", ".norm1.norm", ".norm2", ".norm2.norm")
        of_layers = (f"transformer_blocks.{i}{name}" for i in range(len(self._blocks)) for name in of_a_layer)
        passed_over = ("transformer_blocks", "embedding_dropout", "norm_out", "norm_out.norm", *of_layers)
        return next((path for path in passed_over if is_watched(attrgetter(path)(self._model))), None)

    def foreign_layer(self) -> str | None:
        ends = ("norm_final",) if self.has_plain_ends else ("norm_final", "patch_embed", "proj_out")
        called = (f"transformer_blocks.{i}.{name}" for i in range(len(self._blocks)) for name in ("attn1", "ff"))
        return first_foreign((path, attrgetter(path)(self._model)) for path in (*ends, *called))

    @property
    def has_plain_ends(self) -> bool:
        embed, linear = self._embed, self._model.proj_out
        if self._patch[0] > 1 or not (is_plain(linear) and is_plain_patching(embed)):
            return False
        return len({weight.dtype for weight in (self.weight(), embed.proj.weight, linear.weight)}) == 1

    def patches(self, constants: Scratch) -> Patches:
        proj = self._embed.proj
        return Patches(proj.weight, proj.bias, constants.buffer("positions", self._video_tokens, self._width))

    def head_linear(self) -> Linear:
        """With the features of a patch place by place, as the fused operations have them; the model's have channels
        first.
        """
        linear = self._model.proj_out
        weight, bias = (each.view(self.out_channels, -1, *each.shape[1:]) for each in (linear.weight, linear.bias))
        return Linear(weight.transpose(0, 1).flatten(0, 1), bias.t().flatten())

    @property
    def head_norm(self) -> nn.LayerNorm:
        return cast(nn.LayerNorm, self._model.norm_out.norm)

    def head(self, u: Tensor) -> Tensor:
        _, frames, height, width = self.latent_shape
        depth, rows, columns = self._patch
        grid = frames // depth, height // rows, width // columns
        patches = self._model.proj_out(u).view(len(u), *grid, self.out_channels, *self._patch)
        return cast(Tensor, patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(u), -1, frames, height, width))

    @property
    def out_channels(self) -> int:
        return cast(int, self._model.proj_out.out_features // math.prod(self._patch))

    def _positions(self) -> Tensor:
        """Of all tokens (T, D), in whatever dtype; those that the attention rotates have none."""
        embed, (_, frames, *sides) = self._embed, self.latent_shape
        if not self._adds_positions:
            return self.weight().new_zeros(self.text_tokens + self._video_tokens, self._width)
        video_frames = (frames - 1) * embed.temporal_compression_ratio + 1
        if (*sides, video_frames) == (embed.sample_height, embed.sample_width, embed.sample_frames):
            return cast(Tensor, embed.pos_embedding[0])
        positions = embed._get_positional_embeddings(*sides, video_frames, device=self.weight().device)
        return cast(Tensor, positions[0])

    def _rotary(self, constants: Scratch) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the video tokens' angles (T - L, D / heads), as the model computes with them."""
        if not self._rotates:
            return None
        cos, sin = constants.buffer("rotary", 2, self._video_tokens, self._head_width, dtype=torch.float32)
        return cos, sin

    @property
    def _adds_positions(self) -> bool:
        return bool(self._embed.use_positional_embeddings or self._embed.use_learned_positional_embeddings)

    @property
    def _video_tokens(self) -> int:
        return math.prod(self.latent_shape[1:]) // math.prod(self._patch)

    @property
    def _width(self) -> int:
        return cast(int, self._embed.text_proj.out_features)

    @property
    def _head_width(self) -> int:
        return self._width // cast(int, self._blocks[0].attn1.heads)

    @property
    def _patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        side = self._embed.patch_size
        return self._embed.patch_size_t or 1, side, side

    @property
    def _in_channels(self) -> int:
        proj = self._embed.proj  # a convolution, or of patches of several frames a linear map
        return cast(int, getattr(proj, "in_channels", None) or proj.in_features // math.prod(self._patch))


def _leaves_a_rest(sizes: tuple[int, ...], parts: tuple[int, ...]) -> bool:
    return any(not size or size % part for size, part in zip(sizes, parts, strict=True))


def _rotated(heads: Tensor, rotary: tuple[Tensor, Tensor], text: int) -> Tensor:
    """Heads (N, heads, T, d), of which those of the video are turned by their angles, two channels at a time.

    Source: Su et al., arXiv 2104.09864, equation 34.
    """
    cos, sin = rotary
    video = heads[:, :, text:].float()
    even, odd = video.view(*video.shape[:3], -1, 2).unbind(4)
    turned = video * cos + torch.stack((-odd, even), dim=4).flatten(3) * sin
    return torch.cat((heads[:, :, :text], turned.to(heads.dtype)), dim=2)
