"""diffusers' PixArt (``PixArtTransformer2DModel``, Alpha and Sigma) as a `Family`."""

from functools import cached_property
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import POSITIONS, BranchResources, BufferPool, Conditioning, Modulation
from ebcache_fast.models.diffusers_layers import (
    DiffusersFamily,
    attend,
    feed_forward_into,
    heads_of,
    is_usual_attention,
    latents_of,
    positions_of,
    self_attention_into,
)
from ebcache_fast.models.layers import linear_into
from ebcache_fast.models.layout import Layout, cross_attention, mlp, self_attention
from ebcache_fast.plan import Branch, ModelShape, Site

USUAL_TEXT = 300  # tokens of a prompt, as PixArt-Sigma's pipeline has them


class PixArtConditioning(NamedTuple):
    """Arguments of a call besides latents and timesteps."""

    text: Tensor  # (N, L, E), as the text encoder gives it
    mask: Tensor | None = None  # (N, L) of which 1 is kept, or (N, 1, L) to be added to scores
    resolution: Tensor | None = None  # (N, 2), and
    aspect_ratio: Tensor | None = None  # (N, 1), of models that were trained with sizes

    def rows(self, indices: Tensor) -> "PixArtConditioning":
        """Return the conditioning of these rows (M,), in this order."""
        return PixArtConditioning(
            self.text[indices], *(None if tensor is None else tensor[indices] for tensor in self[1:])
        )


class PixArtDenoiser(DiffusersFamily):
    """PixArt: every layer is self-attention, cross-attention to the text, which takes the stream as it is and has no
    gate, and an MLP. Keys and values of the text are computed once for a run.

    Source: Chen et al., arXiv 2310.00426, section 2.3. Raises what `DiffusersFamily` does.
    """

    layout = Layout(
        name="diffusers' PixArtTransformer2DModel",
        blocks="transformer_blocks",
        norms={Branch.SELF_ATTN: ".norm1", Branch.MLP: ".norm2"},
        called=(".attn1", ".attn2", ".ff"),
        dtype_of=".attn1.to_q",
        embedding="pos_embed",
        head_norm="norm_out",
        head="proj_out",
        known_by=(
            "adaln_single.emb.timestep_embedder",
            "adaln_single.linear",
            "caption_projection",
            "pos_embed.proj.kernel_size",
            "pos_embed.pos_embed.shape",
            ".attn1.heads",
            ".attn2.to_k.in_features",
            ".ff.net.2.in_features",
            ".scale_shift_table",
            "scale_shift_table",
        ),
        read=("scale_shift_table", ".scale_shift_table"),
        passed_over=("adaln_single",),
    )
    _text = USUAL_TEXT

    @cached_property
    def shape(self) -> ModelShape:
        block, width, tokens = self._blocks[0], self.width, self.latent_tokens
        hidden, square = block.ff.net[2].in_features, width * width
        return self._shape_of(
            (self_attention(width, tokens), cross_attention(width, tokens, self._text), mlp(width, hidden, tokens)),
            conditioning=256 * width + 7 * square,  # two layers of 256 frequencies, and one to six vectors
            mlp_hidden_size=hidden,
            num_heads=block.attn1.heads,
            text_size=self._text_width,
        )

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        return latents_of(self._model.pos_embed)

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        self._check_text(context, self._text_width)
        self._check_latents(latents, self.latent_shape[0])
        sizes = cast(PixArtConditioning, context)
        if self._has_sizes and (sizes.resolution is None or sizes.aspect_ratio is None):
            raise InputError("resolution or aspect_ratio is missing, which this model takes; pass added_cond_kwargs")
        return self._resized(latent_shape=tuple(latents), _text=sizes.text.shape[1])

    def probe_inputs(self, rows: int, *, small: bool = True) -> tuple[tuple[int, ...], Conditioning]:
        (height, width), weight = self.patch, self.weight()
        generator = torch.Generator("cpu").manual_seed(1)
        text = torch.randn(rows, 3, self._text_width, generator=generator, device="cpu").to(weight)
        mask = torch.ones(rows, 3, dtype=torch.int64, device=weight.device)
        mask[-1, -1] = 0
        context = PixArtConditioning(text, mask)
        if self._has_sizes:
            resolution, aspect_ratio = (weight.new_tensor(size).expand(rows, -1) for size in ((512.0, 384.0), (0.75,)))
            context = context._replace(resolution=resolution, aspect_ratio=aspect_ratio)
        return (self.latent_shape[0], 2 * height, 3 * width) if small else self.latent_shape, context

    def conditions(self, labels: Tensor) -> Tensor:
        return torch.arange(len(labels), device=labels.device) if self._has_sizes else torch.zeros_like(labels)

    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        conditioning, steps, rows = cast(PixArtConditioning, context), len(t), len(y)
        single = self._model.adaln_single
        sizes = (
            None if size is None or not self._has_sizes else size[y].repeat(steps, 1)
            for size in (conditioning.resolution, conditioning.aspect_ratio)
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
        conditioning = cast(PixArtConditioning, context)
        projection = self._model.caption_projection
        text = conditioning.text.to(self.weight().dtype)
        text = text if projection is None else projection(text)  # (N, L, C), where C is D if it is projected
        rows, length, _ = text.shape
        per_run.buffer("caption", *text.shape).copy_(text)
        per_run.buffer("bias", rows, 1, length).copy_(_bias_of(conditioning.mask, text))
        for layer, block in enumerate(self._blocks):
            keys_and_values = per_run.buffer(f"keys and values {layer}", 2, rows, length, self.width)
            linear_into(block.attn2.to_k, text, keys_and_values[0])
            linear_into(block.attn2.to_v, text, keys_and_values[1])
        positions = positions_of(self._model.pos_embed, self.latent_shape)
        per_run.buffer(POSITIONS, *positions.shape).copy_(positions)

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
        bias = res.per_run.buffer("bias", rows, 1, self._text)
        if not is_usual_attention(attention):
            width = self._text_width if self._model.caption_projection is None else self.width
            caption = res.per_run.buffer("caption", rows, self._text, width)
            out.copy_(attention(u, encoder_hidden_states=caption, attention_mask=bias))
            return
        k, v = res.per_run.buffer(f"keys and values {layer}", 2, rows, self._text, self.width)
        q, k, v = (heads_of(attention, projected) for projected in (attention.to_q(u), k, v))
        linear_into(attention.to_out[0], attend(q, k, v, bias.unsqueeze(1)), out)

    @property
    def _text_width(self) -> int:
        projection = self._model.caption_projection
        return cast(int, (self._blocks[0].attn2.to_k if projection is None else projection.linear_1).in_features)

    @property
    def _has_sizes(self) -> bool:
        return bool(self._model.adaln_single.emb.use_additional_conditions)


def _bias_of(mask: Tensor | None, text: Tensor) -> Tensor:
    """The summand of scores (N, 1, L) that the model makes of a mask."""
    if mask is None:
        return text.new_zeros(len(text), 1, text.shape[1])
    return mask.to(text.dtype) if mask.ndim == 3 else ((1 - mask.to(text.dtype)) * -10000.0).unsqueeze(1)
