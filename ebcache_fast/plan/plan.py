"""The steps of a whole run and what they cost."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, groupby
from typing import Any, Self

from ebcache_fast.errors import TableError
from ebcache_fast.plan.correction import Correction, as_corrections
from ebcache_fast.plan.costs import branch_macs, branch_weights
from ebcache_fast.plan.emitter import check_tokens
from ebcache_fast.plan.factors import factors_of
from ebcache_fast.plan.former import sites_of
from ebcache_fast.plan.lowering import bare, draft, lower, verify
from ebcache_fast.plan.memory import Memory
from ebcache_fast.plan.model_shape import ModelShape
from ebcache_fast.plan.program import CHANGE, OUTPUT, RUN, Program
from ebcache_fast.plan.rules import COMPUTE, Refill
from ebcache_fast.plan.sites import Site, described
from ebcache_fast.plan.spans import KeepSpan
from ebcache_fast.plan.step_plan import StepPlan, StepType
from ebcache_fast.plan.timesteps import exact_timesteps, shown


@dataclass(frozen=True)
class Plan:
    """The StepPlans of a whole run in execution order, their timesteps, the factor b on eps, and corrections of it.

    Raises TableError, naming step and field, unless there is one timestep per step, timesteps are >= 0 and
    strictly decreasing, all steps are for the same sites, none reads what no step stored before, ``eps_scale``
    is finite and above 0, and there is a correction for each step, or none.
    """

    steps: tuple[StepPlan, ...]
    timesteps: tuple[float, ...]  # whole ones are ints
    eps_scale: float = 1.0
    corrections: tuple[Correction, ...] = ()  # of each step; none is neutral

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", exact_timesteps(self.timesteps))
        if strange := next((step for step in self.steps if type(step) is not StepPlan), None):
            raise TableError(f"steps: expected a StepPlan for each timestep, got {shown(strange)}")
        if len(self.steps) != len(self.timesteps):
            raise TableError(f"steps: expected one per timestep, {len(self.timesteps)}, got {len(self.steps)}")
        b: Any = self.eps_scale
        if not isinstance(b, int | float) or not 0 < b < math.inf:
            raise TableError(f"eps_scale: expected a finite number above 0, got {b!r}; 1 is neutral")
        object.__setattr__(self, "corrections", as_corrections(self.corrections, len(self.steps)))
        for i, step in enumerate(self.steps):
            if step.sites != self.sites:
                raise TableError(
                    f"steps[{i}]: expected {described(self.sites)} as in steps[0], got {described(step.sites)}; plan "
                    "every step for the same model"
                )
        verify(map(self._drafts.__getitem__, self.steps))

    @classmethod
    def from_types(
        cls,
        step_types: Iterable[StepType],
        timesteps: Iterable[float],
        sites: tuple[Site, ...],
        eps_scale: float = 1.0,
        *former: float,
    ) -> Self:
        """The plan whose steps each treat all layers of a model of these sites alike; sequences in execution order.

        Raises TableError too for a type that speaks of a branch which the layers lack.
        """
        sites, eps_scale = sites_of(sites, eps_scale, *former)
        types = tuple(step_types)
        uniform = {step_type: StepPlan.uniform(step_type, sites) for step_type in dict.fromkeys(types)}
        return cls(tuple(uniform[step_type] for step_type in types), tuple(timesteps), eps_scale)

    @classmethod
    def uncached(cls, timesteps: Iterable[float], sites: tuple[Site, ...], eps_scale: float = 1.0) -> Self:
        """The plan in which every step computes everything."""
        timesteps = tuple(timesteps)
        return cls.from_types([StepType.NO_CACHE] * len(timesteps), timesteps, sites, eps_scale)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the model, in the order in which it runs them."""
        return self.steps[0].sites

    @cached_property
    def _drafts(self) -> dict[StepPlan, Program]:
        """The program of each distinct step, as far as slots go."""
        return {step: draft(step) for step in dict.fromkeys(self.steps)}

    @cached_property
    def memory(self) -> Memory:
        """The slots that some step reads, over the whole run, and where they lie."""
        return Memory.of(self._drafts.values())

    @cached_property
    def factors(self) -> tuple[tuple[float, ...], ...]:
        """The factor of each extra term of the memory, at each step."""
        return factors_of(map(self._drafts.__getitem__, self.steps), self.memory.extra)

    @cached_property
    def refreshing(self) -> tuple[bool, ...]:
        """True for each step that a run can begin with: it reads nothing kept, and fills all that others read."""
        programs, live = map(self._drafts.__getitem__, self.steps), self.memory.live
        return tuple(not program.reads and program.writes.issuperset(live) for program in programs)

    @cached_property
    def refill(self) -> StepPlan | None:
        """The step that computes everything, and fills all that others read: in a run that begins with any step.

        The first step where it does so. Of several ages each gets the new value, so that a forecast whose factors add
        up to one is that value. None where something else is kept.
        """
        if self.refreshing[0]:
            return self.steps[0]
        live = self.memory.live
        if any(slot.meaning not in (OUTPUT, CHANGE) for slot in live):
            return None
        ages = Counter((slot.meaning, slot.first, slot.last) for slot in live)
        outputs = (ages[OUTPUT, site, site] for site in range(len(self.sites)))
        spans = sorted((first, last, ages[CHANGE, first, last]) for meaning, first, last in ages if meaning == CHANGE)
        try:
            return StepPlan(
                self.sites,
                tuple(Refill(count) if count > 1 else COMPUTE for count in outputs),
                tuple(KeepSpan(first, last, ages=count) for first, last, count in spans),
            )
        except TableError:  # spans that overlap
            return None

    @cached_property
    def reading(self) -> tuple[bool, ...]:
        """True for each step that reads anything that is kept."""
        return tuple(bool(self._drafts[step].reads) for step in self.steps)

    @cached_property
    def collapsing(self) -> frozenset[StepPlan]:
        """The steps of which one launch can sum all that they add, so that our own loop may run several at once."""
        sites = bare(self.sites)
        lowered = {step: lower(step, sites, self.memory, samples=True) for step in self._drafts}
        return frozenset(step for step, program in lowered.items() if any(launch.name == RUN for launch in program))

    def counts(self) -> Counter[StepType | None]:
        """Number of steps of each type, under None of those that fit no type."""
        return Counter(step.step_type for step in self.steps)

    def runs(self) -> tuple[tuple[int, int], ...]:
        """The stretches of consecutive equal steps, each as (index of its first step, length)."""
        lengths = [len(list(equal)) for _, equal in groupby(self.steps)]
        return tuple(zip(accumulate(lengths, initial=0), lengths, strict=False))

    def step_macs(self, shape: ModelShape) -> tuple[int, ...]:
        """Multiply-accumulates of each step, for one row of the batch (one guidance branch of one sample)."""
        return self._by_step(lambda program: shape.fixed_macs + branch_macs(program, shape), shape)

    def macs(self, shape: ModelShape) -> int:
        """Multiply-accumulates of the whole run, for one row of the batch."""
        return sum(self.step_macs(shape))

    def mac_limit(self, shape: ModelShape) -> float:
        """The speed-up over the uncached run that the MAC count allows."""
        return Plan.uncached(self.timesteps, self.sites).macs(shape) / self.macs(shape)

    def cache_bytes(self, shape: ModelShape, rows: int, itemsize: int) -> int:
        """Bytes of cache for a batch of ``rows`` rows (guidance counted) of ``itemsize``-byte elements.

        A live slot has memory of its own; the slots that nobody reads share one slot of scratch.
        """
        self._check_fits(shape)
        return self.memory.slots_for(shape) * rows * shape.slot_elements * itemsize

    def bytes_moved(self, shape: ModelShape, rows: int, itemsize: int) -> tuple[int, ...]:
        """The bytes that each step can't avoid moving, hence a floor for its time on given hardware.

        Once each: the weights it needs, the live slots it computes (written), the slots it reuses (read).
        """
        live, slot = frozenset(self.memory.live), rows * shape.slot_elements

        def moved(program: Program) -> int:
            slots = len(live & program.writes) + len(program.reads)
            return itemsize * (shape.fixed_weights + branch_weights(program, shape) + slot * slots)

        return self._by_step(moved, shape)

    def _by_step(self, fold: Callable[[Program], int], shape: ModelShape) -> tuple[int, ...]:
        """A count over the program of each step."""
        self._check_fits(shape)
        found = {step: fold(program) for step, program in self._drafts.items()}
        return tuple(found[step] for step in self.steps)

    def _check_fits(self, shape: ModelShape) -> None:
        if shape.sites != self.sites:
            raise TableError(
                f"shape: expected {described(self.sites)} as in the plan, got {described(shape.sites)}; make the plan "
                "for this model"
            )
        for launch in chain.from_iterable(self._drafts.values()):
            check_tokens(self.sites[launch.site], launch.tokens, shape.tokens)
