"""The two ends of a step, where latents become tokens and tokens become noise, in two forms of one interface.

`FusedEnds` reads the model's live weights into the fused operations. `ModuleEnds` runs the model's own layers, for
models that changed them (adapters, hooks, parametrizations): the same result, on torch alone.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ebcache_fast import reference
from ebcache_fast.models.denoiser import Denoiser
from ebcache_fast.operands import At, Guide, Linear, Norm, Patches, Update
from ebcache_fast.ops import Operations


@dataclass
class Pending:
    """Branches not yet added to the residual stream, with their gates; whoever reads the stream next adds them."""

    branches: list[Tensor] = field(default_factory=list)  # (R, T, D) each
    gates: list[Tensor] = field(default_factory=list)  # (S, U, D) each


class Ends(Protocol):
    """What a step begins and ends with; see the operations of the same names in `ebcache_fast.reference`."""

    def embed(self, x: Tensor, h: Tensor) -> None:
        """Tokens of x (B, C, H, W) into h (R, T, D)."""
        ...

    def embed_norm_modulate(self, x: Tensor, norm: Norm, at: At, h: Tensor, u: Tensor) -> None:
        """`embed`, and the first branch's input into u."""
        ...

    def predict(self, h: Tensor, pending: Pending, norm: Norm, at: At, guide: Guide, out: Tensor) -> None:
        """The guided and scaled output into out (R, Cout, H, W)."""
        ...

    def update(self, x: Tensor, h: Tensor, pending: Pending, norm: Norm, at: At, guide: Guide, update: Update) -> None:
        """`predict`, and the sampler's step on x in place."""
        ...

    def run_update(self, x: Tensor, sums: Tensor, norm: Norm, at: At, guide: Guide, update: Update) -> None:
        """As many whole ATTN_MLP steps on x in place as there are gated sums (n, R, T, D)."""
        ...


class FusedEnds:
    """The ends through the fused operations."""

    def __init__(self, denoiser: Denoiser, operations: Operations) -> None:
        self._denoiser, self._operations = denoiser, operations

    def embed(self, x: Tensor, h: Tensor) -> None:
        self._operations.embed(x, self._patches, h)

    def embed_norm_modulate(self, x: Tensor, norm: Norm, at: At, h: Tensor, u: Tensor) -> None:
        self._operations.embed_norm_modulate(x, self._patches, norm, at, h, u)

    def predict(self, h: Tensor, pending: Pending, norm: Norm, at: At, guide: Guide, out: Tensor) -> None:
        self._operations.head_predict(h, pending.branches, pending.gates, norm, at, self._linear, guide, out)

    def update(self, x: Tensor, h: Tensor, pending: Pending, norm: Norm, at: At, guide: Guide, update: Update) -> None:
        self._operations.head_update(x, h, pending.branches, pending.gates, norm, at, self._linear, guide, update)

    def run_update(self, x: Tensor, sums: Tensor, norm: Norm, at: At, guide: Guide, update: Update) -> None:
        self._operations.run_update(x, sums, self._patches, norm, at, self._linear, guide, update)

    @property
    def _patches(self) -> Patches:
        return self._denoiser.patches()

    @property
    def _linear(self) -> Linear:
        return self._denoiser.head_linear()


class ModuleEnds:
    """The ends through the model's own layers."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser

    def embed(self, x: Tensor, h: Tensor) -> None:
        tokens = self._denoiser.embed(x.to(h.dtype))  # (B, T, D)
        h.view(-1, *tokens.shape).copy_(tokens.expand(len(h) // len(x), *tokens.shape))

    def embed_norm_modulate(self, x: Tensor, norm: Norm, at: At, h: Tensor, u: Tensor) -> None:
        self.embed(x, h)
        u.copy_(reference.norm_modulate(h, norm, at))
        reference.advance(at)

    def predict(self, h: Tensor, pending: Pending, norm: Norm, at: At, guide: Guide, out: Tensor) -> None:
        self._head(h, pending, norm, at, guide, out)
        reference.advance(at)

    def update(self, x: Tensor, h: Tensor, pending: Pending, norm: Norm, at: At, guide: Guide, update: Update) -> None:
        out = x.new_empty(len(h), self._denoiser.out_channels, *x.shape[2:])
        self._head(h, pending, norm, at, guide, out)
        reference.step_on(x, out, guide, at, update)
        reference.advance(at)

    def run_update(self, x: Tensor, sums: Tensor, norm: Norm, at: At, guide: Guide, update: Update) -> None:
        h = torch.empty_like(sums[0])
        for j, total in enumerate(sums):
            self.embed(x, h)
            self.update(x, h.add_(total), Pending(), norm, At(at.step + j, at.row_of), guide, update)
        reference.advance(at)

    def _head(self, h: Tensor, pending: Pending, norm: Norm, at: At, guide: Guide, out: Tensor) -> None:
        h = h.clone()
        reference.add_gated(h, pending.branches, pending.gates, at)
        out.copy_(self._denoiser.head(reference.norm_modulate(h, norm, at)))
        reference.guide_and_scale(out, guide)


def ends_of(denoiser: Denoiser, operations: Operations) -> Ends:
    """The fused ends wherever the model's are plain layers, as they are now: a hook may come at any step."""
    return FusedEnds(denoiser, operations) if denoiser.has_plain_ends else ModuleEnds(denoiser)
