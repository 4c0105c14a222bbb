"""What the adapters of diffusers' transformers have in common: blocks of known parts, named by a `Layout`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import Conditioning
from ebcache_fast.models.diffusers_layers import first_foreign, refuse_other_ways
from ebcache_fast.models.layers import are_plain_embed_head, is_watched, weight_of
from ebcache_fast.models.layout import check_layout, check_norms

BLOCKS = "transformer_blocks"


@dataclass(frozen=True)
class Layout:
    """Where a transformer has its parts: paths from it or, where a block's are meant, from each block."""

    name: str
    known_by: tuple[str, ...]  # what a module of another layout lacks
    norms: tuple[str, ...]  # LayerNorms that the fused operations compute
    block_norms: tuple[str, ...]
    branches: tuple[str, ...]  # of a block: modules that the engine calls, or the parts of which it calls
    embed_head: tuple[str, str]  # embedding and head: modules that are called unless both are plain
    called: tuple[str, ...] = ()  # what else is called in a step
    passed_over: tuple[str, ...] = ()  # modules of which parts are called, and never they themselves
    block_passed_over: tuple[str, ...] = ()


class DiffusersDenoiser:
    """A transformer of diffusers, known by its attributes.

    Raises InputError, naming the attribute, for a module that lacks one or has other norms, and for one that diffusers
    itself caches or casts layer by layer.
    """

    layout: ClassVar[Layout]

    def __init__(self, model: nn.Module) -> None:
        check_layout(model, self.layout.known_by, f"diffusers' {self.layout.name}")
        refuse_other_ways(model)
        self._model = cast(Any, model)  # known by its attributes: there is no type to name
        self._blocks = list(self._model.transformer_blocks)
        check_norms(model, (*self._of_blocks(self.layout.block_norms), *self.layout.norms))

    @property
    def has_plain_embed_head(self) -> bool:
        embedder, linear = map(self._at, self.layout.embed_head)
        return are_plain_embed_head(embedder, linear, self.weight())

    def _check_there_is_text(self, context: Conditioning) -> None:
        if not context:
            raise InputError(f"{type(self._model).__name__} is given no text to follow here; use its pipeline instead")

    def weight(self) -> Tensor:
        return weight_of(self._blocks[0].attn1.to_q)

    def passed_over_hooks(self) -> str | None:
        where, norms = self.layout, (*self.layout.norms, *self._of_blocks(self.layout.block_norms))
        of_blocks = (*self._of_blocks(("", *where.block_passed_over)), *norms)
        return next((path for path in (BLOCKS, *where.passed_over, *of_blocks) if is_watched(self._at(path))), None)

    def foreign_layer(self) -> str | None:
        embed_head = () if self.has_plain_embed_head else self.layout.embed_head
        paths = (*embed_head, *self.layout.called, *self._of_blocks(self.layout.branches))
        return first_foreign((path, self._at(path)) for path in paths)

    def _of_blocks(self, names: Sequence[str]) -> Iterator[str]:
        return (f"{BLOCKS}.{i}{name and '.'}{name}" for i in range(len(self._blocks)) for name in names)

    def _at(self, path: str) -> Any:
        return attrgetter(path)(self._model)
