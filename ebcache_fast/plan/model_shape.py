"""The sizes of a model that decide what a plan costs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from ebcache_fast.former import warn
from ebcache_fast.plan.sites import Branch, Site, SiteShape


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide cost and memory; its adapter builds it.

    ``fixed_macs`` (per row) and ``fixed_weights`` are what every step costs outside of the sites: embedding,
    modulation, head. ``sizes`` holds the named sizes that a CacheTable can be bound to.
    """

    width: int
    tokens: int
    site_shapes: tuple[SiteShape, ...]  # in the order in which the model runs them
    fixed_macs: int
    fixed_weights: int
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Sites of the model, in the order of `site_shapes`."""
        return tuple(shape.site for shape in self.site_shapes)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return 1 + self.site_shapes[-1].layer

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Branches that the layers run, each once, in order."""
        return tuple(dict.fromkeys(shape.branch for shape in self.site_shapes))

    @property
    def fingerprint(self) -> tuple[tuple[str, int], ...]:
        """`sizes`, by their former name."""
        warn("ModelShape.fingerprint", "ModelShape.sizes")
        return self.sizes

    @property
    def slot_elements(self) -> int:
        """Elements of one slot for one row of the batch."""
        return self.tokens * self.width


def repeated(depth: int, layer: Iterable[SiteShape]) -> tuple[SiteShape, ...]:
    """Shapes of the sites of ``depth`` layers that are all like this one."""
    layer = tuple(layer)
    return tuple(replace(shape, layer=i) for i in range(depth) for shape in layer)
