"""Start and length of each step of a run: measured, or, before any run, by what its plan has it compute."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import TypeAdapter, ValidationError

from ebcache_fast.errors import InputError
from ebcache_fast.plan import ModelShape, Plan, StepType
from ebcache_fast.plan.files import replacing

STEP_NAMES = (*(step_type.name for step_type in StepType), "KEEP", "FORECAST", "MIXED")  # as `StepPlan.type_name`


@dataclass(frozen=True)
class Span:
    """Steps that were run at once: one launch of a CUDA graph, or one after another operation by operation."""

    step_types: tuple[str, ...]
    start: float  # after the start of the first span
    cost: float
    replayed: bool = False  # as a CUDA graph


class TypeCost(NamedTuple):
    """Cost of the steps of one type."""

    step_type: str
    steps: int
    median: float  # of one step
    total: float


@dataclass(frozen=True)
class Timeline:
    """The spans of one run in order, in milliseconds or in GMACs (10^9 multiply-accumulates).

    ``uncached`` is what the run would cost without caching, where that is known; ``about`` says what was run, and
    where. Raises InputError without a span, for an unknown type of step, for a number that is negative or not
    finite, for spans that all take no time, and for starts that are not in order.
    """

    unit: Literal["ms", "GMACs"]
    spans: tuple[Span, ...]
    uncached: float | None = None
    about: Mapping[str, str | int | float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.spans or not all(span.step_types for span in self.spans):
            raise InputError("spans: expected one or more, of at least one step each; measure a run to its end")
        unknown = set(self.step_types) - set(STEP_NAMES)
        if unknown:
            raise InputError(f"step_types: {min(unknown)!r} is unknown; it has to be one of {', '.join(STEP_NAMES)}")
        numbers = [*chain.from_iterable((span.start, span.cost) for span in self.spans), self.uncached or 0.0]
        if not all(0 <= number < math.inf for number in numbers):
            raise InputError("spans: start and cost have to be finite and 0 or more; measure again")
        if not self.end:
            raise InputError("spans: together they take no time at all; measure again")
        if any(late.start < early.start for early, late in pairwise(self.spans)):
            raise InputError("spans: they have to stand in the order of their starts; sort them")

    @classmethod
    def of_plan(cls, plan: Plan, shape: ModelShape, **about: str | float | None) -> Self:
        """The timeline of a plan before any run: multiply-accumulates of one guidance branch of one sample."""
        costs = [macs / 1e9 for macs in plan.step_macs(shape)]
        starts = accumulate(costs[:-1], initial=0.0)
        steps = zip(plan.steps, starts, costs, strict=True)
        spans = tuple(Span((step.type_name,), start, cost) for step, start, cost in steps)
        return cls("GMACs", spans, sum(costs) * plan.mac_limit(shape), about)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; InputError, naming the file and the field, for anything else."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror}; choose a timeline.json") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{path}: {where}: {first['msg']}; choose a timeline.json") from None

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all; JobError where it can't be written."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1))

    @property
    def step_types(self) -> tuple[str, ...]:
        """The type of every step."""
        return tuple(chain.from_iterable(span.step_types for span in self.spans))

    @property
    def end(self) -> float:
        """End of the last span."""
        return max(span.start + span.cost for span in self.spans)

    @property
    def between(self) -> float:
        """Time that passed between the spans."""
        return max(0.0, self.end - sum(span.cost for span in self.spans))

    def by_type(self) -> tuple[TypeCost, ...]:
        """The cost of each type of step that ran, in the order of STEP_NAMES; spans of several share it evenly."""
        costs: dict[str, list[float]] = defaultdict(list)
        for name, cost in _each_step(self.spans):
            costs[name].append(cost)
        return tuple(
            TypeCost(name, len(costs[name]), statistics.median(costs[name]), sum(costs[name]))
            for name in STEP_NAMES
            if name in costs
        )

    def step_ms(self) -> dict[str, float]:
        """Median milliseconds of a step, by the name of its type; InputError for a timeline of MACs."""
        if self.unit != "ms":
            raise InputError(f"unit: expected 'ms', got {self.unit!r}; profile a run, which measures time")
        return {cost.step_type: cost.median for cost in self.by_type()}


def _each_step(spans: Iterable[Span]) -> Iterable[tuple[str, float]]:
    return ((name, span.cost / len(span.step_types)) for span in spans for name in span.step_types)
