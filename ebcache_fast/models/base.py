"""What the engine asks of a model: the ``Denoiser`` protocol, and the modulation that drives it."""

from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebcache_fast.ops.operands import Linear, Patches
from ebcache_fast.ops.operations import Operations
from ebcache_fast.plan import ModelShape, Site

TEXT = "text"  # among the constants: the text tokens (N, text, D) of a model that has them in its stream

# What a caller gives besides latents, timesteps and labels, the same in every step: each adapter names its own.
Conditioning = tuple[Tensor | None, ...]


class Modulation(NamedTuple):
    """Every modulation vector of S steps and U distinct conditions, from one pass over the live parameters.

    The three of a branch are the shift and scale of its LayerNorm's output and the gate of its own output.
    """

    sites: Tensor  # (S, K, 3, U, D)
    head: Tensor  # (S, 2, U, D): shift, scale

    def layers(self, branches: int) -> Tensor:
        """The sites of layers that have so many each, (S, L, branches, 3, U, D)."""
        return torch.unflatten(self.sites, 1, (-1, branches))


class BufferPool(Protocol):
    """Memory by name: the same buffer for the same name, shape and dtype."""

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer of this shape, in the model's dtype unless another is given."""
        ...


class BranchResources(NamedTuple):
    """What a branch runs with."""

    operations: Operations
    scratch: BufferPool  # what it holds means nothing between two branches
    per_run: BufferPool  # what `Denoiser.precompute` wrote
    window: int = 0  # of tokens that self-attention reaches, half of them on either side; 0 for all

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of heads (N, heads, T, d), within the window if there is one."""
        if not self.window:
            return F.scaled_dot_product_attention(q, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        self.operations.window_attention(q, k, v, self.window, out)
        return out


class Denoiser(Protocol):
    """A diffusion transformer as the engine sees it: its parts, not its forward.

    N counts rows of the batch (guidance counted), T tokens, D channels, K sites. Adapters read the module's live
    parameters on every call and keep no derived copy of a weight.
    """

    @property
    def shape(self) -> ModelShape:
        """The sizes that decide cost and memory, with those that a table is bound to."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """One latent's (C, H, W), or of a video (C, F, H, W)."""
        ...

    @property
    def text_tokens(self) -> int:
        """How many of the T tokens, the first ones, are text that has no latents."""
        ...

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        """The same model for latents of this shape (of one row) and such a context; InputError where it takes none."""
        ...

    def probe_inputs(self, rows: int, *, small: bool = True) -> tuple[tuple[int, ...], Conditioning]:
        """The shape of latents to try the model with, if ``small`` no larger than must be, and a context of so many
        rows.
        """
        ...

    @property
    def num_classes(self) -> int:
        """Labels are 0 to ``num_classes - 1``; ``num_classes`` itself is the null label, if there is one."""
        ...

    @property
    def has_null_label(self) -> bool:
        """Whether the model learned the null label, without which there is no guidance."""
        ...

    def weight(self) -> Tensor:
        """An empty, plain tensor of the model's dtype, on its device, to make memory like; InputError without one."""
        ...

    def conditions(self, labels: Tensor) -> Tensor:
        """What modulation depends on besides timesteps, as numbers: of each row (N,), or of each token (N * T,)."""
        ...

    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        """Write the modulation of every pair of timesteps t (S,) and conditions y (U,) int64 into ``out``."""
        ...

    def precompute(self, context: Conditioning, per_run: BufferPool) -> None:
        """Write all that a step needs of the context into ``per_run``, in the same buffers for the same sizes."""
        ...

    def passed_over_hooks(self) -> str | None:
        """A module that has hooks, or a forward of its own, and that the engine does not call; None without any."""
        ...

    def foreign_layer(self) -> str | None:
        """A layer that the engine calls and that is not torch's own: its Python may hold what a graph would keep."""
        ...

    @property
    def out_channels(self) -> int:
        """Channels of the output: C of eps, and as many of the variance interpolation if the model learned it."""
        ...

    @property
    def prediction_type(self) -> str:
        """What the output is where no scheduler says, in diffusers' words: "epsilon" or "v_prediction"."""
        ...

    @property
    def has_plain_embed_head(self) -> bool:
        """Whether embedding and head are bare layers, so that their weights say all; else their modules must run."""
        ...

    def patches(self, per_run: BufferPool) -> Patches:
        """The embedding's weights; only of a plain embedding and head."""
        ...

    def head_linear(self) -> Linear:
        """The last linear map's weights; only of a plain embedding and head."""
        ...

    @property
    def head_norm(self) -> nn.LayerNorm:
        """The last LayerNorm."""
        ...

    def embed(self, x: Tensor, per_run: BufferPool) -> Tensor:
        """Latents (B, C, H, W) -> tokens (N or B, T, D), text included, through the model's own layers."""
        ...

    def final(self, h: Tensor) -> Tensor:
        """What the head takes of the stream (N, T, D), before its own LayerNorm: (N, T - text, D), contiguous."""
        ...

    def head(self, u: Tensor) -> Tensor:
        """The head's modulated input (N, T - text, D) -> (N, C or 2C, H, W), through the model's own layers."""
        ...

    def norm(self, site: Site) -> nn.LayerNorm | None:
        """The LayerNorm before a branch; None where the branch takes the stream as it is."""
        ...

    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        """Write a branch's ungated output for its input u (N, T, D) into ``out``, of the same shape."""
        ...
