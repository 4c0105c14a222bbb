"""Timesteps as a sampler gives them to its model, by which steps are known: each compared exactly."""

import reprlib
from collections.abc import Collection, Iterable
from itertools import islice, pairwise
from typing import Any

from ebcache_fast.errors import TableError

MAX_INT = 2**63 - 1  # what an int64 tensor holds


def exact_timesteps(timesteps: Iterable[Any]) -> tuple[float, ...]:
    """Timesteps in execution order, each an int where it is whole, else the very float.

    Scalars of numpy and torch are taken too. Raises TableError, naming the place, unless there is one, all are numbers
    from 0 to `MAX_INT`, and they strictly decrease.
    """
    exact = tuple(exact_timestep(f"timesteps[{i}]", t) for i, t in enumerate(timesteps))
    if not exact:
        raise TableError("timesteps: expected at least one, got none")
    for i, (before, t) in enumerate(pairwise(exact), start=1):
        if t >= before:
            raise TableError(
                f"timesteps[{i}]: expected less than {before}, the one before, got {t}; "
                + (_REPEATED if t in exact[:i] else "timesteps stand in execution order, each once")
            )
    return exact


_REPEATED = (
    "a scheduler that comes back to a timestep, as Heun's and PNDM's do, can't be followed: use another one, such as "
    "Euler's or DPM-Solver++, or make the table over the distinct timesteps"
)


def shown(value: object) -> str:
    """A value as it may stand in a message; str() itself refuses the longest integers."""
    return "an integer beyond 64 bits" if isinstance(value, int) and abs(value) > MAX_INT else reprlib.repr(value)


def some_of(names: Collection[str]) -> str:
    """Names as they may stand in a message: a dozen at most, and how many there are besides."""
    listed, more = ", ".join(islice(names, 12)), len(names) - 12
    return f"{listed} and {more} more" if more > 0 else listed


def exact_timestep(name: str, value: Any) -> float:
    """An int where it is whole, else the very float, also of a scalar of numpy or torch; TableError for no timestep."""
    is_scalar = hasattr(value, "item") and getattr(value, "ndim", None) == 0  # of numpy or torch
    number = value.item() if is_scalar else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= MAX_INT:
        raise TableError(f"{name}: expected a number from 0 to {MAX_INT}, got {shown(number)}")
    return int(number) if number == int(number) else number
