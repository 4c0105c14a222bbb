"""Models as the engine sees them: a `Family` is one as parts, which modulation, computed beforehand, drives."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebcache_fast.errors import InputError
from ebcache_fast.models.layers import are_plain_embed_head, is_plain, weight_of
from ebcache_fast.models.layout import Layout, at
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Linear, Patches
from ebcache_fast.ops.operations import Operations
from ebcache_fast.plan import ModelShape, Site, SiteShape, repeated

TEXT = "text"  # the buffer of text tokens (N, text, D), of a model that has them in its stream
POSITIONS = "positions"  # the buffer of the latents' positions (T - text, D)

# Arguments of a forward besides latents, timesteps and labels, the same in every step: each family names its own.
Conditioning = tuple[Tensor | None, ...]


class Modulation(NamedTuple):
    """Modulation vectors of S steps and U distinct conditions: of a site the shift and scale of its LayerNorm's
    output and the gate of its branch's.
    """

    sites: Tensor  # (S, K, 3, U, D)
    head: Tensor  # (S, 2, U, D): shift, scale

    def layers(self, branches: int) -> Tensor:
        """`sites` by layer, where each has as many branches: (S, L, branches, 3, U, D)."""
        return torch.unflatten(self.sites, 1, (-1, branches))


class BufferPool(Protocol):
    """Memory by name: the same buffer for the same name, shape and dtype."""

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer of this shape, in the model's dtype unless another is given."""
        ...


class BranchResources(NamedTuple):
    """Operations and memory that a branch runs with."""

    operations: Operations
    scratch: BufferPool  # of no meaning between two branches
    per_run: BufferPool  # as `Family.precompute` wrote it
    window: int = 0  # tokens that self-attention reaches, half of them on either side; 0 for all

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of heads (N, heads, T, d), within the window if there is one."""
        if not self.window:
            return F.scaled_dot_product_attention(q, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        self.operations.window_attention(q, k, v, self.window, out)
        return out

    def linear_gelu(self, linear: Any, u: Tensor) -> Tensor | None:
        """``gelu_tanh(linear(u))``, (N, T, D) -> (N, T, F), in one operation; None where none can run this layer."""
        operation = self.operations.linear_gelu
        if operation is None or not (is_plain(linear) and u.dtype == linear.weight.dtype):
            return None
        out = self.scratch.buffer("mlp", *u.shape[:2], linear.out_features)
        operation(u.flatten(0, 1), Linear(linear.weight, linear.bias), out.flatten(0, 1))
        return out


class Family(ABC):
    """Models of one `Layout`, seen as the engine runs them: part by part, not by their forward.

    N counts rows of the batch (guidance counted), T tokens, text included, D channels, K sites. A family reads the
    module's live parameters on every call and keeps no derived copy of a weight. Members without a body are a family's
    to write; the others hold for most, and follow from the layout.
    Raises InputError, naming the attribute, for a module that lacks one or has other norms.
    """

    layout: ClassVar[Layout]

    def __init__(self, model: nn.Module) -> None:
        self.layout.check(model)
        self._model = cast(Any, model)  # known by its attributes: there is no type to name
        self._blocks = list(at(model, self.layout.blocks))

    @property
    @abstractmethod
    def shape(self) -> ModelShape:
        """The sizes that decide cost and memory, with those that a table is bound to."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """One latent's (C, H, W), or of a video (C, F, H, W)."""

    @property
    def width(self) -> int:
        """Channels D of the residual stream."""
        return self.head_norm.normalized_shape[-1]

    @property
    def text_tokens(self) -> int:
        """Tokens that are text and have no latents, the first of the T."""
        return 0

    @property
    def patch(self) -> tuple[int, ...]:
        """Latents of a token: rows and columns, or of a video frames, rows and columns."""
        return cast(tuple[int, ...], self._embedding.proj.kernel_size)

    @property
    def latent_tokens(self) -> int:
        """Tokens that have latents, the last of the T."""
        return math.prod(self.latent_shape[1:]) // math.prod(self.patch)

    @property
    def out_channels(self) -> int:
        """Channels of the output: C of eps, and as many of the variance interpolation if the model learned it."""
        return cast(int, self._at(self.layout.head).out_features // math.prod(self.patch))

    @property
    def prediction_type(self) -> str:
        """The output's meaning where no scheduler says it, in diffusers' words: "epsilon" or "v_prediction"."""
        return "epsilon"

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        """Return the family for latents of this shape (of one row) and such a context; InputError if it takes none."""
        if tuple(latents) != self.latent_shape:
            got, wanted = (", ".join(map(str, shape)) for shape in (latents, self.latent_shape))
            raise InputError(f"x of shape (rows, {got}) does not fit; this model takes (rows, {wanted})")
        return self

    def probe_inputs(self, rows: int, *, small: bool = True) -> tuple[tuple[int, ...], Conditioning]:
        """A shape of latents to try the model with, if ``small`` no larger than must be, and a context of so many
        rows.
        """
        return self.latent_shape, ()

    @property
    def num_classes(self) -> int:
        """The number of labels, from 0; it is itself the null label, if there is one. 1 where text alone differs."""
        return 1

    @property
    def has_null_label(self) -> bool:
        """True if the model learned the null label, without which there is no guidance."""
        return True

    def conditions(self, labels: Tensor) -> Tensor:
        """Numbers of what modulation depends on besides timesteps: of each row (N,), or of each token (N * T,)."""
        return labels

    @abstractmethod
    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        """Write the modulation of every pair of timesteps t (S,) and conditions y (U,) int64 into ``out``."""

    def precompute(self, context: Conditioning, per_run: BufferPool) -> None:
        """Write all that a step needs of the context into ``per_run``, in the same buffers for the same sizes."""
        return

    def embed(self, x: Tensor, per_run: BufferPool) -> Tensor:
        """Latents (B, C, H, W) -> tokens (N or B, T, D), text included, through the model's own layers."""
        return cast(Tensor, self._embedding(x))

    def norm(self, site: Site) -> nn.LayerNorm | None:
        """The LayerNorm before a branch; None where the branch takes the stream as it is."""
        path = self.layout.norms.get(site.branch)
        return None if path is None else cast(nn.LayerNorm, at(self._blocks[site.layer], path[1:]))

    @abstractmethod
    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        """Write a branch's ungated output for its input u (N, T, D) into ``out``, of the same shape."""

    def final(self, h: Tensor) -> Tensor:
        """The head's part of the stream (N, T, D), before its own LayerNorm: (N, T - text, D), contiguous."""
        return h

    @property
    def head_norm(self) -> nn.LayerNorm:
        """The last LayerNorm."""
        return cast(nn.LayerNorm, self._at(self.layout.head_norm))

    def head(self, u: Tensor) -> Tensor:
        """The head's modulated input (N, T - text, D) -> (N, C or 2C, H, W), through the model's own layers."""
        patches: Tensor = self._at(self.layout.head)(u).contiguous()  # (N, T, patch * patch * channels)
        out = patches.new_empty(len(u), self.out_channels, *self.latent_shape[1:])
        reference.unpatchify(patches, out)
        return out

    def patches(self, per_run: BufferPool) -> Patches:
        """The embedding's weights; only of a plain embedding and head."""
        proj, positions = self._embedding.proj, self.read_positions()
        size = self.latent_tokens, self.width
        return Patches(proj.weight, proj.bias, per_run.buffer(POSITIONS, *size) if positions is None else positions)

    def read_positions(self) -> Tensor | None:
        """The model's own positions (T, D), which `patches` hands on; None of those that `precompute` writes."""
        return None

    def head_linear(self) -> Linear:
        """The last linear map's weights; only of a plain embedding and head."""
        linear = self._at(self.layout.head)
        return Linear(linear.weight, linear.bias)

    def weight(self) -> Tensor:
        """An empty, plain tensor of the model's dtype, on its device, to make memory like; InputError without one."""
        return weight_of(at(self._blocks[0], self.layout.dtype_of[1:]))

    @property
    def has_plain_embed_head(self) -> bool:
        """True if embedding and head are bare layers, so that their weights say all; else their modules must run."""
        tensors = (tensor for tensor in (self.weight(), self.read_positions()) if tensor is not None)
        return are_plain_embed_head(self._embedding, self._at(self.layout.head), *tensors)

    def passed_over_hooks(self) -> str | None:
        """A module that has hooks, or a forward of its own, and that the engine does not call; None without any."""
        return self.layout.watched(self._model)

    def foreign_layer(self) -> str | None:
        """A layer that the engine calls and whose Python may hold what a graph would keep; None without any."""
        return self.layout.foreign(self._model, embed_head=not self.has_plain_embed_head)

    def _at(self, path: str) -> Any:
        return at(self._model, path)

    @property
    def _embedding(self) -> Any:
        return self._at(self.layout.embedding)

    def _resized(self, **sizes: Any) -> Self:
        """Return a copy of the family with these attributes, over the same module."""
        other = copy.copy(self)
        vars(other).pop("shape", None)  # computed of the former ones
        vars(other).update(sizes)
        return other

    def _shape_of(self, branches: Sequence[SiteShape], conditioning: int, **sizes: int) -> ModelShape:
        """The shape of layers that all run these branches; ``conditioning``: the weights that make modulation."""
        channels, depth = (self.latent_shape[0], self.out_channels), len(self._blocks)
        embed_head = math.prod(self.patch) * sum(channels) * self.width
        common = {"depth": depth, "hidden_size": self.width, "patch_size": self.patch[-1]}
        return ModelShape(
            width=self.width,
            tokens=self.text_tokens + self.latent_tokens,
            site_shapes=repeated(depth, branches),
            fixed_macs=conditioning + embed_head * self.latent_tokens,
            fixed_weights=conditioning + embed_head,
            sizes=(*common.items(), ("in_channels", channels[0]), ("out_channels", channels[1]), *sizes.items()),
        )


Denoiser = Family  # a model as the engine sees it
