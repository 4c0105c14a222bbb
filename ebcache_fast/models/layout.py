"""What the layouts of a DiT have in common: how they are recognised, and what their steps cost."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from operator import attrgetter
from typing import Self

from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import BufferPool, Conditioning
from ebcache_fast.models.layers import PLAIN_TENSORS, has
from ebcache_fast.plan import Branch, ModelShape, SiteShape, repeated


def check_layout(model: nn.Module, paths: Iterable[str], whose: str) -> None:
    """InputError, naming the attribute, for a module that lacks one of these."""
    for path in paths:
        if not has(model, path):
            name = type(model).__name__
            raise InputError(f"{name} has no {path!r}, so it is not of the layout of {whose}; pass such a module")


def check_norms(model: nn.Module, paths: Iterable[str]) -> None:
    """InputError, naming it, where one of these is no LayerNorm of plain parameters."""
    for path in paths:
        norm = attrgetter(path)(model) if has(model, path) else None
        if not isinstance(norm, nn.LayerNorm):
            raise InputError(
                f"{type(model).__name__}'s {path!r} is a {type(norm).__name__}, which no fused operation computes; "
                "pass a module with torch's LayerNorm there"
            )
        check_plain(model, (f"{path}.{name}" for name, _ in norm.named_parameters(recurse=False)))


def check_plain(model: nn.Module, paths: Iterable[str]) -> None:
    """InputError, naming it, where one of these tensors, which no module computes with, is of a class of its own."""
    for path in paths:
        if type(tensor := attrgetter(path)(model)) not in PLAIN_TENSORS:
            raise InputError(
                f"{type(model).__name__}'s {path!r} is a {type(tensor).__name__}, and the engine reads plain tensors "
                "there; quantise linear layers alone, or load the model whole instead of sharded"
            )


def self_attention(width: int, tokens: int) -> SiteShape:
    """What a layer's self-attention costs."""
    square = width * width
    return SiteShape(0, Branch.SELF_ATTN, macs=4 * square * tokens + 2 * tokens * tokens * width, weights=4 * square)


def cross_attention(width: int, tokens: int, keys: int) -> SiteShape:
    """What attention to so many keys costs, which are computed once for a run, as their values are, over the stream as
    it is.
    """
    square = width * width
    macs = 2 * square * tokens + 2 * tokens * keys * width
    return SiteShape(0, Branch.CROSS_ATTN, macs, weights=2 * square, is_normed=False)


def mlp(width: int, hidden: int, tokens: int) -> SiteShape:
    """What a layer's MLP costs."""
    return SiteShape(0, Branch.MLP, macs=2 * width * hidden * tokens, weights=2 * width * hidden)


def shape_of(
    depth: int,
    width: int,
    hidden: int,
    heads: int,
    tokens: int,
    patch_size: int,
    channels: tuple[int, int],
    num_classes: int,
    conditioning: int,
) -> ModelShape:
    """The shape of a DiT of these sizes; ``channels`` in and out, ``conditioning`` the weights that make modulation."""
    embed_head = patch_size**2 * sum(channels) * width
    return ModelShape(
        width=width,
        tokens=tokens,
        site_shapes=repeated(depth, (self_attention(width, tokens), mlp(width, hidden, tokens))),
        fixed_macs=conditioning + embed_head * tokens,
        fixed_weights=conditioning + embed_head,
        sizes=(
            ("depth", depth),
            ("hidden_size", width),
            ("mlp_hidden_size", hidden),
            ("num_heads", heads),
            ("tokens", tokens),
            ("patch_size", patch_size),
            ("in_channels", channels[0]),
            ("out_channels", channels[1]),
            ("num_classes", num_classes),
        ),
    )


class LabelConditioned(ABC):
    """What adapters have in common whose latents have one size, at first, and whose only condition is a label."""

    text_tokens: int = 0
    prediction_type: str = "epsilon"

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]: ...

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        if tuple(latents) != self.latent_shape:
            given, wanted = (", ".join(map(str, shape)) for shape in (latents, self.latent_shape))
            raise InputError(f"x of shape (rows, {given}) does not fit; this model takes (rows, {wanted})")
        return self

    def probe_inputs(self, rows: int, *, small: bool = True) -> tuple[tuple[int, ...], Conditioning]:
        return self.latent_shape, ()

    def conditions(self, labels: Tensor) -> Tensor:
        return labels

    def precompute(self, context: Conditioning, per_run: BufferPool) -> None:
        return  # there is nothing besides labels

    def final(self, h: Tensor) -> Tensor:
        return h
