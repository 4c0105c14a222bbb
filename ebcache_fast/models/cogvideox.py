"""diffusers' CogVideoX (``CogVideoXTransformer3DModel``) seen as a ``Denoiser``, known by its attributes."""

import math
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ebcache_fast.models.base import TEXT, BranchResources, BufferPool, Conditioning, Modulation
from ebcache_fast.models.cogvideox_sizes import CogVideoXConditioning, CogVideoXSizes
from ebcache_fast.models.diffusers_layers import feed_forward_into, heads_of, is_usual_attention, refuse_window
from ebcache_fast.models.layers import linear_into
from ebcache_fast.models.layout import mlp, self_attention
from ebcache_fast.ops.operands import Linear, Patches
from ebcache_fast.plan import Branch, ModelShape, Site, repeated

_TEXT, _VIDEO = 0, 1  # the two conditions that tokens have


class CogVideoXDenoiser(CogVideoXSizes):
    """The parts of a CogVideoXTransformer3DModel, read from the live module.

    Text and video are one stream, text first, with norms and gates of their own in every layer, and one attention over
    both (Yang et al., arXiv 2408.06072, section 2.2). Only video tokens have a head. Raises what `DiffusersDenoiser`
    does.
    """

    @cached_property
    def shape(self) -> ModelShape:
        block, depth, width = self._blocks[0], len(self._blocks), self.width
        hidden = block.ff.net[2].in_features
        tokens = self.text_tokens + self.video_tokens
        embedded = block.norm1.linear.in_features
        timestep = (width + embedded + (12 * depth + 2) * width) * embedded
        embed_head = width * (self.in_channels + self.out_channels) * math.prod(self.patch)
        return ModelShape(
            width=width,
            tokens=tokens,
            site_shapes=repeated(depth, (self_attention(width, tokens), mlp(width, hidden, tokens))),
            fixed_macs=timestep + embed_head * self.video_tokens,
            fixed_weights=timestep + embed_head,
            sizes=(
                ("depth", depth),
                ("hidden_size", width),
                ("mlp_hidden_size", hidden),
                ("num_heads", block.attn1.heads),
                ("patch_size", self.patch[1]),
                ("in_channels", self.in_channels),
                ("out_channels", self.out_channels),
                ("text_size", self.patch_embed.text_proj.in_features),
            ),
        )

    def conditions(self, labels: Tensor) -> Tensor:
        of_a_row = torch.full((self.text_tokens + self.video_tokens,), _VIDEO, device=labels.device)
        of_a_row[: self.text_tokens] = _TEXT
        return of_a_row.repeat(len(labels))

    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        model, given, dtype = self._model, cast(CogVideoXConditioning, context), self.weight().dtype
        c = model.time_embedding(model.time_proj(t).to(dtype))  # (S, E)
        if given.ofs is not None:
            c = c + model.ofs_embedding(model.ofs_proj(given.ofs.reshape(1)).to(dtype))
        layers = out.layers(2)
        for layer, block in enumerate(self._blocks):
            for branch, norm in enumerate((block.norm1, block.norm2)):
                vectors = norm.linear(norm.silu(c)).view(len(t), 2, 3, -1).flip(1)  # of text, of video
                layers[:, layer, branch] = vectors[:, y].transpose(1, 2)
        head = model.norm_out.linear(model.norm_out.silu(c)).view(len(t), 2, 1, -1)
        out.head.copy_(head.expand(-1, -1, len(y), -1))

    def precompute(self, context: Conditioning, per_run: BufferPool) -> None:
        given = cast(CogVideoXConditioning, context)
        text, positions = given.text.to(self.weight().dtype), self.positions()
        per_run.buffer("embeddings", *text.shape).copy_(text)
        tokens = per_run.buffer(TEXT, len(text), self.text_tokens, self.width)
        torch.add(self.patch_embed.text_proj(text), positions[: self.text_tokens].to(text.dtype), out=tokens)
        per_run.buffer("positions", self.video_tokens, self.width).copy_(positions[self.text_tokens :])
        if (rotary := self._rotary(per_run)) is not None and given.cos is not None and given.sin is not None:
            rotary[0].copy_(given.cos)
            rotary[1].copy_(given.sin)

    def embed(self, x: Tensor, per_run: BufferPool) -> Tensor:
        text = per_run.buffer("embeddings", self.rows, self.text_tokens, self.patch_embed.text_proj.in_features)
        video = x.repeat(self.rows // len(x), 1, 1, 1, 1).transpose(1, 2)
        return cast(Tensor, self.patch_embed(text, video))

    def final(self, h: Tensor) -> Tensor:
        return cast(Tensor, self._model.norm_final(h[:, self.text_tokens :])).contiguous()

    def norm(self, site: Site) -> nn.LayerNorm:
        block = self._blocks[site.layer]
        return cast(nn.LayerNorm, (block.norm1 if site.branch is Branch.SELF_ATTN else block.norm2).norm)

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
        q, k, v = (heads_of(attention, each(u)) for each in (attention.to_q, attention.to_k, attention.to_v))
        q = q if attention.norm_q is None else attention.norm_q(q)
        k = k if attention.norm_k is None else attention.norm_k(k)
        rotary = self._rotary(res.per_run)
        if rotary is not None:
            q, k = (_rotated(each, rotary, self.text_tokens) for each in (q, k))
        return res.attend(q, k, v).transpose(1, 2).flatten(2)

    def patches(self, per_run: BufferPool) -> Patches:
        proj = self.patch_embed.proj
        return Patches(proj.weight, proj.bias, per_run.buffer("positions", self.video_tokens, self.width))

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
        depth, rows, columns = self.patch
        grid = frames // depth, height // rows, width // columns
        patches = self._model.proj_out(u).view(len(u), *grid, self.out_channels, *self.patch)
        return cast(Tensor, patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(u), -1, frames, height, width))

    @property
    def out_channels(self) -> int:
        return cast(int, self._model.proj_out.out_features // math.prod(self.patch))

    def _rotary(self, per_run: BufferPool) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the video tokens' angles (T - L, D / heads), as the model computes with them."""
        if not self.rotates:
            return None
        cos, sin = per_run.buffer("rotary", 2, self.video_tokens, self.head_width, dtype=torch.float32)
        return cos, sin


def _rotated(heads: Tensor, rotary: tuple[Tensor, Tensor], text: int) -> Tensor:
    """Heads (N, heads, T, d), of which those of the video are turned by their angles, two channels at a time.

    Source: Su et al., arXiv 2104.09864, equation 34.
    """
    cos, sin = rotary
    video = heads[:, :, text:].float()
    even, odd = video.view(*video.shape[:3], -1, 2).unbind(4)
    turned = video * cos + torch.stack((-odd, even), dim=4).flatten(3) * sin
    return torch.cat((heads[:, :, :text], turned.to(heads.dtype)), dim=2)
