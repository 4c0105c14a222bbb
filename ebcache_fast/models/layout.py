"""Paths to a family's parts, and all that follows from these alone: recognition, hooks, foreign layers, costs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.layers import PLAIN_TENSORS, first_foreign, has, is_watched
from ebcache_fast.plan import Branch, SiteShape


@dataclass(frozen=True)
class Layout:
    """Paths to a transformer's parts. One that begins with a dot starts at each of its blocks."""

    name: str  # of the model, for messages
    blocks: str
    norms: Mapping[Branch, str]  # LayerNorms before branches, which the fused operations compute
    called: tuple[str, ...]  # modules that a step calls besides embedding and head
    dtype_of: str  # the layer whose dtype is the model's
    embedding: str  # a convolution ``proj`` and what surrounds it
    head_norm: str  # a LayerNorm, as `norms`
    head: str  # a linear layer
    known_by: tuple[str, ...]  # attributes that tell it, with those above, from other families
    may_lack: tuple[str, ...] = ()  # modules that a step calls where they are there
    read: tuple[str, ...] = ()  # tensors that are read as they are
    passed_over: tuple[str, ...] = ()  # modules of which parts are called, and never they themselves

    def missing(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of this layout that a model lacks."""
        return tuple(path for path in self._marks if not has(model, path))

    def likeness(self, model: nn.Module) -> float:
        """The part of this layout's paths that a model has, 0 to 1."""
        return 1 - len(self.missing(model)) / len(self._marks)

    def check(self, model: nn.Module) -> None:
        """Raise InputError, naming the attribute, for another layout, other norms, or tensors that are not plain."""
        if missing := self.missing(model):
            name = type(model).__name__
            raise InputError(
                f"{name} has no {missing[0]!r}, so it is not of the layout of {self.name}; pass such a module"
            )
        for path in self.paths(model, (*self.norms.values(), self.head_norm)):
            _check_norm(model, path)
        for path in self.paths(model, self.read):
            _check_plain(model, path)

    def paths(self, model: nn.Module, paths: Iterable[str]) -> Iterator[str]:
        """Yield these paths from the model: its own first, then block by block."""
        of_blocks = [path for path in paths if path.startswith(".")]
        yield from (path for path in paths if not path.startswith("."))
        for i in range(len(at(model, self.blocks))):
            yield from (f"{self.blocks}.{i}{path}".rstrip(".") for path in of_blocks)

    def watched(self, model: nn.Module) -> str | None:
        """A module with hooks, or a forward of its own, that no step calls; None without any."""
        paths = (self.blocks, *self.passed_over, self.head_norm, ".", *self.norms.values())
        return next((path for path in self.paths(model, paths) if is_watched(at(model, path))), None)

    def foreign(self, model: nn.Module, *, embed_head: bool) -> str | None:
        """A layer that a step calls, those of embedding and head if these are, and that is neither torch's nor
        diffusers' own; None without any.
        """
        outer = (self.embedding, self.head) if embed_head else ()
        called = self.paths(model, (*outer, *self.called, *self.may_lack))
        return first_foreign((path, at(model, path)) for path in called if has(model, path))

    @property
    def _marks(self) -> tuple[str, ...]:
        required = (
            *(f"{norm}.eps" for norm in (*self.norms.values(), self.head_norm)),
            *self.called,
            self.dtype_of,
            f"{self.embedding}.proj",
            f"{self.head}.out_features",
            *self.known_by,
        )
        return tuple(f"{self.blocks}.0{path}" if path.startswith(".") else path for path in required)


def at(model: nn.Module, path: str) -> Any:
    """The attribute at the end of a path; AttributeError without one."""
    return attrgetter(path)(model)


def _check_norm(model: nn.Module, path: str) -> None:
    norm = at(model, path) if has(model, path) else None
    if not isinstance(norm, nn.LayerNorm):
        raise InputError(
            f"{type(model).__name__}'s {path!r} is a {type(norm).__name__}, which no fused operation computes; "
            "pass a module with torch's LayerNorm there"
        )
    for name, _ in norm.named_parameters(recurse=False):
        _check_plain(model, f"{path}.{name}")


def _check_plain(model: nn.Module, path: str) -> None:
    if type(tensor := at(model, path)) not in PLAIN_TENSORS:
        raise InputError(
            f"{type(model).__name__}'s {path!r} is a {type(tensor).__name__}, and the engine reads plain tensors "
            "there; quantise linear layers alone, or load the model whole instead of sharded"
        )


def self_attention(width: int, tokens: int) -> SiteShape:
    """The cost of a layer's self-attention."""
    square = width * width
    return SiteShape(0, Branch.SELF_ATTN, macs=4 * square * tokens + 2 * tokens * tokens * width, weights=4 * square)


def cross_attention(width: int, tokens: int, keys: int) -> SiteShape:
    """The cost of attention to so many keys over the stream as it is; keys and values are computed once for a run."""
    square = width * width
    macs = 2 * square * tokens + 2 * tokens * keys * width
    return SiteShape(0, Branch.CROSS_ATTN, macs, weights=2 * square, is_normed=False)


def mlp(width: int, hidden: int, tokens: int) -> SiteShape:
    """The cost of a layer's MLP."""
    return SiteShape(0, Branch.MLP, macs=2 * width * hidden * tokens, weights=2 * width * hidden)
