"""The steps of a whole run and what they cost."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Self

from ebcache_fast.errors import TableError
from ebcache_fast.plan.model_shape import BranchShape, ModelShape
from ebcache_fast.plan.step_plan import Branch, Slot, StepPlan, StepType
from ebcache_fast.plan.timesteps import exact_timesteps


@dataclass(frozen=True)
class Plan:
    """The StepPlans of a whole run in execution order, their timesteps, and the factor b on eps.

    Raises TableError, naming step and field, unless there is one timestep per step, timesteps are >= 0 and
    strictly decreasing, all steps are for the same layers and branches, the first computes everything, and
    ``eps_scale`` is finite and above 0.
    """

    steps: tuple[StepPlan, ...]
    timesteps: tuple[float, ...]  # whole ones are ints
    eps_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", exact_timesteps(self.timesteps))
        if len(self.steps) != len(self.timesteps):
            raise TableError(f"steps: expected one per timestep, {len(self.timesteps)}, got {len(self.steps)}")
        if not 0 < self.eps_scale < math.inf:
            raise TableError(f"eps_scale: expected a finite number above 0, got {self.eps_scale}; 1 is neutral")
        for i, step in enumerate(self.steps):
            if (step.depth, step.branches) != (self.depth, self.branches):
                raise TableError(
                    f"steps[{i}]: expected {_layers(self.depth, self.branches)} as in steps[0], "
                    f"got {_layers(step.depth, step.branches)}; plan every step for the same model"
                )
        # A first step that computes everything fills every slot, so nothing is ever read before it is stored.
        for layer, branch in self.steps[0].reused:
            raise TableError(
                f"steps[0].actions[{layer}]: expected {branch.name} to be computed, got REUSE; "
                "nothing is stored yet, so make the first step NO_CACHE"
            )

    @classmethod
    def from_types(
        cls,
        step_types: Iterable[StepType],
        timesteps: Iterable[float],
        depth: int,
        branches: tuple[Branch, ...],
        eps_scale: float = 1.0,
    ) -> Self:
        """The plan whose steps each treat all layers alike; both sequences in execution order.

        Raises TableError too for a type that speaks of a branch which the layers lack.
        """
        types = tuple(step_types)
        uniform = {step_type: StepPlan.uniform(step_type, depth, branches) for step_type in dict.fromkeys(types)}
        return cls(tuple(uniform[step_type] for step_type in types), tuple(timesteps), eps_scale)

    @classmethod
    def uncached(
        cls, timesteps: Iterable[float], depth: int, branches: tuple[Branch, ...], eps_scale: float = 1.0
    ) -> Self:
        """The plan in which every step computes everything."""
        timesteps = tuple(timesteps)
        return cls.from_types([StepType.NO_CACHE] * len(timesteps), timesteps, depth, branches, eps_scale)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self.steps[0].depth

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches in the order in which a layer runs them."""
        return self.steps[0].branches

    @cached_property
    def live_slots(self) -> frozenset[Slot]:
        """The slots that some step reads, over the whole run."""
        return frozenset(slot for step in self.steps for slot in step.reused)

    def counts(self) -> Counter[StepType | None]:
        """How many steps there are of each type; None counts those that fit no type."""
        return Counter(step.step_type for step in self.steps)

    def runs(self) -> tuple[tuple[int, int], ...]:
        """The stretches of consecutive equal steps, each as (index of its first step, length)."""
        lengths = [len(list(equal)) for _, equal in groupby(self.steps)]
        return tuple(zip(accumulate(lengths, initial=0), lengths, strict=False))

    def step_macs(self, shape: ModelShape) -> tuple[int, ...]:
        """Multiply-accumulates of each step, for one row of the batch (one guidance branch of one sample)."""
        costs = self._costs(shape)
        return tuple(shape.fixed_macs + sum(costs[b].macs for _, b in step.computed) for step in self.steps)

    def macs(self, shape: ModelShape) -> int:
        """Multiply-accumulates of the whole run, for one row of the batch."""
        return sum(self.step_macs(shape))

    def mac_limit(self, shape: ModelShape) -> float:
        """The speed-up over the uncached run that the MAC count allows."""
        return Plan.uncached(self.timesteps, self.depth, self.branches).macs(shape) / self.macs(shape)

    def cache_bytes(self, shape: ModelShape, rows: int, itemsize: int) -> int:
        """Bytes of cache for a batch of ``rows`` rows (guidance counted) of ``itemsize``-byte elements.

        A live slot has memory of its own; the slots that nobody reads share one slot of scratch.
        """
        self._costs(shape)
        scratch = len(self.live_slots) < self.depth * len(self.branches)
        return (len(self.live_slots) + scratch) * rows * shape.slot_elements * itemsize

    def bytes_moved(self, shape: ModelShape, rows: int, itemsize: int) -> tuple[int, ...]:
        """The bytes that each step can't avoid moving, hence a floor for its time on given hardware.

        Once each: the weights it needs, the live slots it computes (written), the slots it reuses (read).
        """
        costs = self._costs(shape)
        weights = (shape.fixed_weights + sum(costs[b].weights for _, b in step.computed) for step in self.steps)
        slots = (len(self.live_slots.intersection(step.computed)) + len(step.reused) for step in self.steps)
        slot = rows * shape.slot_elements
        return tuple(itemsize * (w + slot * n) for w, n in zip(weights, slots, strict=True))

    def _costs(self, shape: ModelShape) -> dict[Branch, BranchShape]:
        costs = {cost.branch: cost for cost in shape.branches}
        if (shape.depth, *costs) != (self.depth, *self.branches):
            raise TableError(
                f"shape: expected {_layers(self.depth, self.branches)} as in the plan, "
                f"got {_layers(shape.depth, tuple(costs))}; make the plan for this model"
            )
        return costs


def _layers(depth: int, branches: tuple[Branch, ...]) -> str:
    return f"{depth} layers of {' + '.join(branch.name for branch in branches)}"
