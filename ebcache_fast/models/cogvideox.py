"""diffusers' CogVideoX (``CogVideoXTransformer3DModel``) as a `Family`."""

import math
from functools import cached_property, partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import POSITIONS, TEXT, BranchResources, BufferPool, Conditioning, Modulation
from ebcache_fast.models.diffusers_layers import (
    DiffusersFamily,
    feed_forward_into,
    heads_of,
    is_usual_attention,
    refuse_window,
    rotated,
)
from ebcache_fast.models.layers import linear_into
from ebcache_fast.models.layout import Layout, mlp, self_attention
from ebcache_fast.ops.operands import Linear
from ebcache_fast.plan import Branch, ModelShape, Site

_TEXT, _VIDEO = 0, 1  # the two conditions that tokens have


class CogVideoXConditioning(NamedTuple):
    """Arguments of a call besides latents and timesteps."""

    text: Tensor  # (N, L, E), as the text encoder gives it
    cos: Tensor | None = None  # (T - L, D / heads), of rotary embeddings, and
    sin: Tensor | None = None
    ofs: Tensor | None = None  # (1,) or (), of models that take it

    def rows(self, indices: Tensor) -> "CogVideoXConditioning":
        """Return the conditioning of these rows (M,), in this order."""
        return self._replace(text=self.text[indices])


class CogVideoXDenoiser(DiffusersFamily):
    """CogVideoX: text and video are one stream, text first, with norms and gates of their own in every layer, and one
    attention over both. Only video tokens have a head.

    Source: Yang et al., arXiv 2408.06072, section 2.2. Raises what `DiffusersFamily` does.
    """

    layout = Layout(
        name="diffusers' CogVideoXTransformer3DModel",
        blocks="transformer_blocks",
        norms={Branch.SELF_ATTN: ".norm1.norm", Branch.MLP: ".norm2.norm"},
        called=("norm_final", ".attn1", ".ff"),
        dtype_of=".attn1.to_q",
        embedding="patch_embed",
        head_norm="norm_out.norm",
        head="proj_out",
        known_by=(
            "patch_embed.proj.bias",
            "patch_embed.text_proj.in_features",
            "patch_embed.patch_size",
            "patch_embed.max_text_seq_length",
            "time_proj",
            "time_embedding",
            "ofs_embedding",
            "norm_final.eps",
            "norm_out.linear",
            ".norm1.linear",
            ".attn1.heads",
            ".ff.net.2.in_features",
        ),
        passed_over=("embedding_dropout", "norm_out", ".norm1", ".norm2"),
    )
    prediction_type = "v_prediction"
    _text_rows, _rotates = 1, False  # rows of the text, and whether attention rotates its heads

    @cached_property
    def shape(self) -> ModelShape:
        block, width, depth = self._blocks[0], self.width, len(self._blocks)
        hidden, embedded = block.ff.net[2].in_features, block.norm1.linear.in_features
        tokens = self.text_tokens + self.latent_tokens
        return self._shape_of(
            (self_attention(width, tokens), mlp(width, hidden, tokens)),
            conditioning=(width + embedded + (12 * depth + 2) * width) * embedded,
            mlp_hidden_size=hidden,
            num_heads=block.attn1.heads,
            text_size=self._text_width,
        )

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        embed = self._embedding
        proj = embed.proj  # a convolution, or of patches of several frames a linear map
        channels = getattr(proj, "in_channels", None) or proj.in_features // math.prod(self.patch)
        frames = (embed.sample_frames - 1) // embed.temporal_compression_ratio + 1
        return channels, frames, embed.sample_height, embed.sample_width

    @cached_property
    def text_tokens(self) -> int:
        return cast(int, self._embedding.max_text_seq_length)

    @property
    def patch(self) -> tuple[int, int, int]:
        side = self._embedding.patch_size
        return self._embedding.patch_size_t or 1, side, side

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        self._check_text(context, self._text_width)
        self._check_latents(latents, self.latent_shape[0])
        conditioning = cast(CogVideoXConditioning, context)
        rows, length, _ = conditioning.text.shape
        rotates = conditioning.cos is not None
        family = self._resized(latent_shape=tuple(latents), text_tokens=length, _text_rows=rows, _rotates=rotates)
        family._check_positions(conditioning)
        return family

    def _check_positions(self, conditioning: CogVideoXConditioning) -> None:
        embed, table = self._embedding, (self.latent_tokens, self._head_width)
        if _adds_positions(embed) and self.text_tokens != embed.max_text_seq_length:
            raise InputError(
                f"text of {self.text_tokens} tokens does not fit the model's positions; pad it to "
                f"{embed.max_text_seq_length}"
            )
        sides, learned = self.latent_shape[2:], (embed.sample_height, embed.sample_width)
        if embed.use_learned_positional_embeddings and sides != learned:
            raise InputError(
                f"height and width {sides} do not fit the model's learned positions; they must be {learned}"
            )
        shapes = {None if angles is None else tuple(angles.shape) for angles in conditioning[1:3]}
        if shapes not in ({None}, {table}):
            raise InputError(f"rotary embeddings of shape {shapes} do not fit; they are two of {table}, or None")
        if (conditioning.ofs is None) != (self._model.ofs_embedding is None):
            raise InputError(
                f"ofs={conditioning.ofs} does not fit; pass one number to a model that takes it, None to others"
            )

    def probe_inputs(self, rows: int, *, small: bool = True) -> tuple[tuple[int, ...], Conditioning]:
        weight, embed, (channels, *own) = self.weight(), self._embedding, self.latent_shape
        frames, height, width = self.patch
        is_own = embed.use_learned_positional_embeddings or not small
        video = own if is_own else (2 * frames, height, 2 * width)
        draw = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
        text = draw(rows, embed.max_text_seq_length, self._text_width).to(weight)
        ofs = None if self._model.ofs_embedding is None else weight.new_full((1,), 2.0)
        context = CogVideoXConditioning(text, ofs=ofs)
        if not embed.use_positional_embeddings:
            angles = draw(math.prod(video) // math.prod(self.patch), self._head_width).to(weight).float()
            context = context._replace(cos=angles.cos(), sin=angles.sin())
        return (channels, *video), context

    def conditions(self, labels: Tensor) -> Tensor:
        of_a_row = torch.full((self.shape.tokens,), _VIDEO, device=labels.device)
        of_a_row[: self.text_tokens] = _TEXT
        return of_a_row.repeat(len(labels))

    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        model, ofs, dtype = self._model, cast(CogVideoXConditioning, context).ofs, self.weight().dtype
        c = model.time_embedding(model.time_proj(t).to(dtype))  # (S, E)
        if ofs is not None:
            c = c + model.ofs_embedding(model.ofs_proj(ofs.reshape(1)).to(dtype))
        layers = out.layers(2)
        for layer, block in enumerate(self._blocks):
            for branch, norm in enumerate((block.norm1, block.norm2)):
                vectors = norm.linear(norm.silu(c)).view(len(t), 2, 3, -1).flip(1)  # of text, of video
                layers[:, layer, branch] = vectors[:, y].transpose(1, 2)
        head = model.norm_out.linear(model.norm_out.silu(c)).view(len(t), 2, 1, -1)
        out.head.copy_(head.expand(-1, -1, len(y), -1))

    def precompute(self, context: Conditioning, per_run: BufferPool) -> None:
        conditioning = cast(CogVideoXConditioning, context)
        text, positions = conditioning.text.to(self.weight().dtype), self._positions()
        per_run.buffer("embeddings", *text.shape).copy_(text)
        tokens = per_run.buffer(TEXT, len(text), self.text_tokens, self.width)
        torch.add(self._embedding.text_proj(text), positions[: self.text_tokens].to(text.dtype), out=tokens)
        per_run.buffer(POSITIONS, self.latent_tokens, self.width).copy_(positions[self.text_tokens :])
        if (rotary := self._rotary(per_run)) is not None:
            for buffer, angles in zip(rotary, conditioning[1:3], strict=True):
                buffer.copy_(cast(Tensor, angles))

    def _positions(self) -> Tensor:
        """Positions of all tokens (T, D), in whatever dtype; those that the attention rotates have none."""
        embed, (_, frames, *sides) = self._embedding, self.latent_shape
        if not _adds_positions(embed):
            return self.weight().new_zeros(self.shape.tokens, self.width)
        video_frames = (frames - 1) * embed.temporal_compression_ratio + 1
        if (*sides, video_frames) == (embed.sample_height, embed.sample_width, embed.sample_frames):
            return cast(Tensor, embed.pos_embedding[0])
        positions = embed._get_positional_embeddings(*sides, video_frames, device=self.weight().device)
        return cast(Tensor, positions[0])

    def embed(self, x: Tensor, per_run: BufferPool) -> Tensor:
        text = per_run.buffer("embeddings", self._text_rows, self.text_tokens, self._text_width)
        video = x.repeat(self._text_rows // len(x), 1, 1, 1, 1).transpose(1, 2)
        return cast(Tensor, self._embedding(text, video))

    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        block = self._blocks[site.layer]
        if site.branch is Branch.MLP:
            feed_forward_into(block.ff, u, out, res)
        elif is_usual_attention(block.attn1, "CogVideoXAttnProcessor2_0", also=("norm_q", "norm_k")):
            linear_into(block.attn1.to_out[0], self._attend(block.attn1, u, res), out)
        else:
            refuse_window(block.attn1, res)
            text, video = u[:, : self.text_tokens], u[:, self.text_tokens :]
            rotary = self._rotary(res.per_run)
            video, text = block.attn1(video, encoder_hidden_states=text, image_rotary_emb=rotary)
            torch.cat([text, video], dim=1, out=out)

    def _attend(self, attention: Any, u: Tensor, res: BranchResources) -> Tensor:
        """Attention over text and video before its output projection, (N, T, D) -> (N, T, D)."""
        projections = attention.to_q, attention.to_k, attention.to_v
        q, k, v = (heads_of(attention, projection(u)) for projection in projections)
        q = q if attention.norm_q is None else attention.norm_q(q)
        k = k if attention.norm_k is None else attention.norm_k(k)
        if (rotary := self._rotary(res.per_run)) is not None:
            q, k = (rotated(heads, rotary, self.text_tokens) for heads in (q, k))
        return res.attend(q, k, v).transpose(1, 2).flatten(2)

    def _rotary(self, per_run: BufferPool) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the video tokens' angles (T - L, D / heads), as the model computes with them."""
        if not self._rotates:
            return None
        cos, sin = per_run.buffer("rotary", 2, self.latent_tokens, self._head_width, dtype=torch.float32)
        return cos, sin

    def final(self, h: Tensor) -> Tensor:
        return cast(Tensor, self._model.norm_final(h[:, self.text_tokens :])).contiguous()

    def head(self, u: Tensor) -> Tensor:
        (frames, height, width), patch = self.latent_shape[1:], self.patch
        grid = (size // part for size, part in zip((frames, height, width), patch, strict=True))
        patches = self._model.proj_out(u).view(len(u), *grid, self.out_channels, *patch)
        return cast(Tensor, patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(u), -1, frames, height, width))

    def head_linear(self) -> Linear:
        """The last map's weights with the features of a patch place by place, as the fused operations have them; the
        model's have channels first.
        """
        linear = self._model.proj_out
        weight, bias = (part.view(self.out_channels, -1, *part.shape[1:]) for part in (linear.weight, linear.bias))
        return Linear(weight.transpose(0, 1).flatten(0, 1), bias.t().flatten())

    @property
    def _text_width(self) -> int:
        return cast(int, self._embedding.text_proj.in_features)

    @property
    def _head_width(self) -> int:
        return self.width // cast(int, self._blocks[0].attn1.heads)


def _adds_positions(embed: Any) -> bool:
    return bool(embed.use_positional_embeddings or embed.use_learned_positional_embeddings)
