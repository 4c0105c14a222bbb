"""The sizes of a model that decide what a plan costs."""

from dataclasses import dataclass

from ebcache_fast.plan.step_plan import Branch


@dataclass(frozen=True, slots=True)
class BranchShape:
    """What one branch of ONE layer costs: multiply-accumulates (half its FLOPs) for one row of the batch
    (one guidance branch of one sample), and the parameters it reads.
    """

    branch: Branch
    macs: int
    weights: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that decide cost and memory; its adapter builds it.

    ``fixed_macs`` (per row) and ``fixed_weights`` are what every step costs outside the branches: embedding,
    modulation, head. ``fingerprint`` holds the named sizes that a CacheTable can be bound to.
    """

    depth: int
    width: int
    tokens: int
    branches: tuple[BranchShape, ...]  # in the order in which a layer runs them
    fixed_macs: int
    fixed_weights: int
    fingerprint: tuple[tuple[str, int], ...]

    @property
    def slot_elements(self) -> int:
        """Elements of one slot for one row of the batch."""
        return self.tokens * self.width
