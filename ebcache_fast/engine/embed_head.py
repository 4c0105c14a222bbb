"""Embedding and head of a step, where latents become tokens and tokens become noise, in three forms of one interface.

`FusedEmbedHead` reads the model's live weights into the fused operations; `JointEmbedHead` does so where text tokens
stand before those of the latents. `ModuleEmbedHead` runs the model's own layers, for models that changed them
(adapters, hooks, parametrizations): the same result, on torch alone.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ebcache_fast.models.base import TEXT, BufferPool, Denoiser
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import GuidanceArgs, Linear, Norm, Patches, StepIndex, Update
from ebcache_fast.ops.operations import Operations

OF_EMBED_HEAD = (
    "embed",
    "embed_norm_modulate",
    "head_predict",
    "head_update",
    "run_update",
)  # the operations that they use


@dataclass
class Pending:
    """Branches not yet added to the residual stream, with their gates; whoever reads the stream next adds them."""

    branches: list[Tensor] = field(default_factory=list)  # as the stream, each
    gates: list[Tensor] = field(default_factory=list)  # (S, U, D) each


class EmbedHead(Protocol):
    """First and last operations of a step; see those of the same names in `ebcache_fast.ops.reference`.

    The stream h, and u and sums alike, is (R, T, D), or (R * T, 1, D) where each token has a condition of its own.
    """

    def embed(self, x: Tensor, h: Tensor) -> None:
        """Write the tokens of x (B, C, H, W) into h."""
        ...

    def embed_norm_modulate(self, x: Tensor, norm: Norm, at: StepIndex, h: Tensor, u: Tensor) -> None:
        """`embed`, and the first branch's input into u."""
        ...

    def predict(self, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, out: Tensor) -> None:
        """Write the guided and scaled output into out (R, Cout, H, W)."""
        ...

    def update(
        self, x: Tensor, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
    ) -> None:
        """`predict`, and the sampler's step on x in place."""
        ...

    def run_update(
        self, x: Tensor, sums: Tensor, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
    ) -> None:
        """Run a whole ATTN_MLP step on x in place for each of the gated sums, each of h's shape."""
        ...


class FusedEmbedHead:
    """Embedding and head through the fused operations."""

    def __init__(self, denoiser: Denoiser, operations: Operations, per_run: BufferPool) -> None:
        self._denoiser, self._operations, self._per_run = denoiser, operations, per_run

    def embed(self, x: Tensor, h: Tensor) -> None:
        self._operations.embed(x, self._patches, h)

    def embed_norm_modulate(self, x: Tensor, norm: Norm, at: StepIndex, h: Tensor, u: Tensor) -> None:
        self._operations.embed_norm_modulate(x, self._patches, norm, at, h, u)

    def predict(self, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, out: Tensor) -> None:
        self._operations.head_predict(h, pending.branches, pending.gates, norm, at, self._linear, guide, out)

    def update(
        self, x: Tensor, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
    ) -> None:
        self._operations.head_update(x, h, pending.branches, pending.gates, norm, at, self._linear, guide, update)

    def run_update(
        self, x: Tensor, sums: Tensor, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
    ) -> None:
        self._operations.run_update(x, sums, self._patches, norm, at, self._linear, guide, update)

    @property
    def _patches(self) -> Patches:
        return self._denoiser.patches(self._per_run)

    @property
    def _linear(self) -> Linear:
        return self._denoiser.head_linear()


class JointEmbedHead(FusedEmbedHead):
    """Fused embedding and head of models where text tokens stand before the latents', which alone have a head."""

    def embed(self, x: Tensor, h: Tensor) -> None:
        rows = self._rows(h)  # (R, T, D)
        text = self._denoiser.text_tokens
        rows[:, :text] = self._per_run.buffer(TEXT, len(rows), text, rows.shape[2])
        for i, row in enumerate(rows):
            super().embed(_as_images(x)[i % len(x)][None], row[None, text:])

    def embed_norm_modulate(self, x: Tensor, norm: Norm, at: StepIndex, h: Tensor, u: Tensor) -> None:
        self.embed(x, h)
        self._operations.gated_residual_norm_modulate(h, (), (), norm, at, u)

    def predict(self, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, out: Tensor) -> None:
        tokens, at = self._finished(h, pending, at)
        super().predict(tokens, Pending(), norm, at, guide, _as_images(out))

    def update(
        self, x: Tensor, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
    ) -> None:
        tokens, at = self._finished(h, pending, at)
        x = _as_images(x)
        if update.noise is not None:
            update = update._replace(noise=update.noise.view(-1, *x.shape))
        if update.previous is not None:
            update = update._replace(previous=update.previous.view(x.shape))
        super().update(x, tokens, Pending(), norm, at, guide, update)

    def run_update(
        self, x: Tensor, sums: Tensor, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
    ) -> None:
        _run_one_by_one(self, x, sums, norm, at, guide, update)

    def _finished(self, h: Tensor, pending: Pending, at: StepIndex) -> tuple[Tensor, StepIndex]:
        """The head's tokens (R, T - text, D), and the place that each of its rows reads at."""
        if pending.branches:
            self._operations.gated_residual(h, pending.branches, pending.gates, StepIndex(at.step, at.row_of))
        rows = self._rows(h)
        return self._denoiser.final(rows), at._replace(row_of=_of_the_head(at, len(rows)))

    def _rows(self, h: Tensor) -> Tensor:
        return h.view(-1, self._denoiser.shape.tokens, h.shape[2])


class ModuleEmbedHead:
    """Embedding and head through the model's own layers."""

    def __init__(self, denoiser: Denoiser, per_run: BufferPool) -> None:
        self._denoiser, self._per_run = denoiser, per_run

    def embed(self, x: Tensor, h: Tensor) -> None:
        tokens = self._denoiser.embed(x.to(h.dtype), self._per_run)  # (R or B, T, D)
        h.view(-1, *tokens.shape).copy_(tokens.expand(h.numel() // tokens.numel(), *tokens.shape))

    def embed_norm_modulate(self, x: Tensor, norm: Norm, at: StepIndex, h: Tensor, u: Tensor) -> None:
        self.embed(x, h)
        u.copy_(reference.norm_modulate(h, norm, at))
        reference.advance(at)

    def predict(self, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, out: Tensor) -> None:
        self._head(h, pending, norm, at, guide, out)
        reference.advance(at)

    def update(
        self, x: Tensor, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
    ) -> None:
        out = x.new_empty(len(x) * guide.copies, self._denoiser.out_channels, *x.shape[2:])
        self._head(h, pending, norm, at, guide, out)
        reference.step_on(x, out, guide, at, update)
        reference.advance(at)

    def run_update(
        self, x: Tensor, sums: Tensor, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
    ) -> None:
        _run_one_by_one(self, x, sums, norm, at, guide, update)

    def _head(self, h: Tensor, pending: Pending, norm: Norm, at: StepIndex, guide: GuidanceArgs, out: Tensor) -> None:
        h = h.clone()
        reference.add_gated(h, pending.branches, pending.gates, at)
        tokens = self._denoiser.final(h.view(len(out), -1, h.shape[2]))
        u = reference.norm_modulate(tokens, norm, StepIndex(at.step, _of_the_head(at, len(out))))
        out.copy_(self._denoiser.head(u))
        reference.guide_and_scale(out, guide)


def embed_head_of(denoiser: Denoiser, operations: Operations, per_run: BufferPool) -> EmbedHead:
    """The fused form wherever the model's are plain layers, as they are now: a hook may come at any step."""
    if not denoiser.has_plain_embed_head:
        return ModuleEmbedHead(denoiser, per_run)
    return (JointEmbedHead if denoiser.text_tokens else FusedEmbedHead)(denoiser, operations, per_run)


def _run_one_by_one(
    embed_head: EmbedHead, x: Tensor, sums: Tensor, norm: Norm, at: StepIndex, guide: GuidanceArgs, update: Update
) -> None:
    """`EmbedHead.run_update` as so many updates."""
    h = torch.empty_like(sums[0])
    for j, total in enumerate(sums):
        embed_head.embed(x, h)
        embed_head.update(x, h.add_(total), Pending(), norm, StepIndex(at.step + j, at.row_of), guide, update)
    reference.advance(at)


def _as_images(videos: Tensor) -> Tensor:
    """View frames below each other, (N, C, F, H, W) -> (N, C, F * H, W)."""
    return videos.view(*videos.shape[:2], -1, videos.shape[-1])


def _of_the_head(at: StepIndex, rows: int) -> Tensor:
    """The condition of each row's last token, which the head is for."""
    return at.row_of.view(rows, -1)[:, -1].contiguous()
