"""Checks of a Cache Table's fields: each is made plain and held to its range; every message names the field."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from operator import index

from ebcache_fast.errors import TableError
from ebcache_fast.plan import MAX_INT, StepPlan, StepType, shown
from ebcache_fast.plan.table_schema import Provenance, SamplerSpec


def check_lengths(
    timesteps: Sequence[float],
    step_types: Sequence[StepType | None],
    sampler: SamplerSpec | None,
    provenance: Provenance | None,
) -> None:
    """Raise TableError, naming the field, unless all that is said of each step is said of each of the timesteps."""
    lengths = {"step_types": len(step_types)}
    if sampler is not None:
        lengths["sampler.steps"] = sampler.steps
    if provenance is not None:
        lengths |= {f"made.errors.{name}": len(errors) for name, errors in provenance.errors.items()}
        lengths |= {f"made.votes.{name}": len(votes) for name, votes in provenance.votes.items()}
    for name, length in lengths.items():
        if length != len(timesteps):
            raise TableError(f"{name}: expected {len(timesteps)}, one per timestep, got {length}")
    if sampler is not None and timesteps[0] >= sampler.train_steps:
        raise TableError(
            f"timesteps[0]: expected less than sampler.train_steps, {sampler.train_steps}, got {timesteps[0]}"
        )


def check_first(step_types: Sequence[StepType | None]) -> None:
    """Raise TableError unless the first step computes everything."""
    if (first := step_types[0]) is not StepType.NO_CACHE:
        raise TableError(
            f"step_types[0]: expected NO_CACHE, got {first and first.name}; the first step run has nothing to reuse"
        )


def _as_int(name: str, value: object, highest: int = MAX_INT) -> int:
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number <= highest:
        raise TableError(f"{name}: expected an integer from 0 to {highest}, got {shown(value)}")
    return number


def as_step_types(codes: Iterable[int | None], steps: tuple[StepPlan, ...] | None) -> tuple[StepType | None, ...]:
    """Types from their codes; with ``steps`` they have to be theirs."""
    if steps is None:
        return tuple(_as_step_type(f"step_types[{i}]", step_type) for i, step_type in enumerate(codes))
    types, codes = tuple(step.step_type for step in steps), tuple(codes)
    if codes != types:
        raise TableError(
            f"step_types: expected those of step_plans, got {shown(codes)}; give the types alone, with step_plans=None"
        )
    return types


def _as_step_type(name: str, value: object) -> StepType:
    return StepType(_as_int(name, value, max(StepType)))


def as_eps_scale(value: float, allow_amplify: bool) -> float:
    """Return the factor b as a float; TableError unless it is in (0, 1], or above where that is allowed."""
    highest = sys.float_info.max if allow_amplify else 1.0
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= highest:
        raise TableError(
            f"eps_scale: expected a number above 0 and at most 1, got {shown(value)}; "
            "with allow_amplify it may be any finite number above 0"
        )
    return float(value)


def as_sizes(model: Mapping[str, int] | Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Return the sizes of a model, sorted by name; TableError, naming it, for one that is no count."""
    return tuple(sorted((name, _as_int(f"model.{name}", size)) for name, size in dict(model).items()))
