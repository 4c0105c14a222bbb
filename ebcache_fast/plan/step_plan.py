"""What one step computes and what it reuses: branches, actions, the types of steps, and `StepPlan`."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cached_property
from itertools import chain, product
from typing import Self

from ebcache_fast.errors import TableError


class Branch(Enum):
    """One residual branch of a transformer layer."""

    SELF_ATTN = "self_attn"
    CROSS_ATTN = "cross_attn"
    MLP = "mlp"


class Action(Enum):
    """What a step does with one slot: run the branch and store its output, or read what is stored."""

    COMPUTE = "compute"
    REUSE = "reuse"


class StepType(IntEnum):
    """The steps that treat all layers alike; 0 to 3 as in EB-Cache's released tables (arXiv 2503.07120).

    ATTENTION and ATTN_MLP mean whatever attention a model has. The types after MLP tell self-attention from
    cross-attention, so that every set of branches has a type.
    """

    NO_CACHE = 0
    ATTENTION = 1
    ATTN_MLP = 2
    MLP = 3
    SELF_ATTENTION = 4
    CROSS_ATTENTION = 5
    SELF_ATTN_MLP = 6
    CROSS_ATTN_MLP = 7

    @property
    def reuses(self) -> frozenset[Branch]:
        """The branches that such a step reuses in every layer."""
        return _REUSES[self]

    def fits(self, branches: tuple[Branch, ...]) -> bool:
        """Whether layers of these branches have all that it speaks of, as layers of any branches have of 0 to 3."""
        return self <= StepType.MLP or self.reuses <= frozenset(branches)


_REUSES = {
    StepType.NO_CACHE: frozenset[Branch](),
    StepType.ATTENTION: frozenset({Branch.SELF_ATTN, Branch.CROSS_ATTN}),
    StepType.ATTN_MLP: frozenset(Branch),
    StepType.MLP: frozenset({Branch.MLP}),
    StepType.SELF_ATTENTION: frozenset({Branch.SELF_ATTN}),
    StepType.CROSS_ATTENTION: frozenset({Branch.CROSS_ATTN}),
    StepType.SELF_ATTN_MLP: frozenset({Branch.SELF_ATTN, Branch.MLP}),
    StepType.CROSS_ATTN_MLP: frozenset({Branch.CROSS_ATTN, Branch.MLP}),
}

Slot = tuple[int, Branch]  # the cache slot of one branch of one layer


@dataclass(frozen=True)
class StepPlan:
    """The action of one step on every slot. Hashable: it is the CUDA graph's key.

    ``branches`` is their order inside a layer, ``actions[layer][k]`` the action on ``branches[k]``.
    Raises TableError without a layer or branch, for a repeated branch, or a row of another length.
    """

    branches: tuple[Branch, ...]
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        if not self.branches or len(set(self.branches)) != len(self.branches):
            raise TableError(f"branches: expected one or more, each once, got {self.branches!r}")
        lengths = [len(row) for row in self.actions]
        if set(lengths) != {len(self.branches)}:
            raise TableError(f"actions: expected a row of {len(self.branches)} per layer, got rows of {lengths}")

    @classmethod
    def uniform(cls, step_type: StepType, depth: int, branches: tuple[Branch, ...]) -> Self:
        """The plan that treats all ``depth`` layers as ``step_type`` says.

        Raises TableError for a type that speaks of a branch which the layers lack.
        """
        if not step_type.fits(branches):
            raise TableError(
                f"step type {step_type.name}: expected layers with {branch_names(step_type.reuses)}, got layers of "
                f"{branch_names(branches)}; use a table made for this model"
            )
        row = tuple(Action.REUSE if branch in step_type.reuses else Action.COMPUTE for branch in branches)
        return cls(branches, (row,) * depth)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.actions)

    @cached_property
    def step_type(self) -> StepType | None:
        """The step type this plan equals, the first that does; None where layers differ."""
        types = (t for t in StepType if t.fits(self.branches))
        return next((t for t in types if StepPlan.uniform(t, self.depth, self.branches) == self), None)

    @property
    def type_name(self) -> str:
        """The name of its step type, "MIXED" where it has none."""
        return "MIXED" if self.step_type is None else self.step_type.name

    @cached_property
    def computed(self) -> tuple[Slot, ...]:
        """The slots this step computes and stores, in order of execution."""
        return self._slots(Action.COMPUTE)

    @cached_property
    def reused(self) -> tuple[Slot, ...]:
        """The slots this step reads, in order of execution."""
        return self._slots(Action.REUSE)

    @property
    def computes_nothing(self) -> bool:
        """Whether no branch runs, so that all layers collapse into one sum over gated slots."""
        return not self.computed

    def action(self, layer: int, branch: Branch) -> Action:
        """What this step does with one slot."""
        return self.actions[layer][self.branches.index(branch)]

    def _slots(self, wanted: Action) -> tuple[Slot, ...]:
        slots = product(range(self.depth), self.branches)
        actions = chain.from_iterable(self.actions)
        return tuple(slot for slot, action in zip(slots, actions, strict=True) if action is wanted)


def branch_names(branches: Iterable[Branch]) -> str:
    """Branches as messages name them, in the order of `Branch`: ``SELF_ATTN + MLP``."""
    chosen = frozenset(branches)
    return " + ".join(branch.name for branch in Branch if branch in chosen)
