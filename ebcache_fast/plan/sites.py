"""Residual branches counted through a model in execution order, and what each of them costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple


class Branch(Enum):
    """Residual branch of a transformer layer."""

    SELF_ATTN = "self_attn"
    CROSS_ATTN = "cross_attn"
    MLP = "mlp"

    @property
    def branch(self) -> "Branch":
        """The branch itself: a model's shape once held the cost of each branch, which named it so. It will go."""
        return self


class Site(NamedTuple):
    """Branch of one layer. A model's sites stand in the order in which it runs them."""

    layer: int
    branch: Branch

    def __str__(self) -> str:
        return f"{self.layer}.{self.branch.value}"


@dataclass(frozen=True, slots=True)
class SiteShape:
    """Cost of one site: multiply-accumulates (half its FLOPs) for one row of the batch (one guidance branch of one
    sample), and the parameters that it reads.

    is_parallel: it takes the same input as the site before it, of which the output is not added yet.
    is_normed: its input is the normalised, modulated stream; else it takes the stream as it is.
    """

    layer: int
    branch: Branch
    macs: int
    weights: int
    is_parallel: bool = False
    is_normed: bool = True

    @property
    def site(self) -> Site:
        """Place of the site in the model."""
        return Site(self.layer, self.branch)


def layered(depth: int, branches: Sequence[Branch]) -> tuple[Site, ...]:
    """Sites of ``depth`` layers that all run the same branches."""
    return tuple(Site(layer, branch) for layer in range(depth) for branch in branches)


def branch_names(branches: Iterable[Branch]) -> str:
    """Branches as messages name them, in the order of `Branch`: ``SELF_ATTN + MLP``."""
    named = frozenset(branches)
    return " + ".join(branch.name for branch in Branch if branch in named)


def described(sites: Sequence[Site]) -> str:
    """Sites as messages name them: ``28 layers of SELF_ATTN + MLP``, and so on where layers differ."""
    layers = [" + ".join(site.branch.name for site in of_layer) for _, of_layer in groupby(sites, attrgetter("layer"))]
    return ", then ".join(f"{len(list(alike))} layers of {names}" for names, alike in groupby(layers))
