"""CacheTable: the type of step that runs at each timestep, and the one strict JSON format it is kept in."""

import os
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any, Self

from ebcache_fast.errors import TableError
from ebcache_fast.plan import MAX_INT, ModelShape, Plan, StepType, exact_timesteps, shown
from ebcache_fast.retiming import steps_as_far
from ebcache_fast.table_file import naming, read_json, write_json
from ebcache_fast.table_fit import check_origin, check_sizes
from ebcache_fast.table_schema import SET_FORMAT, TABLE_FORMAT, Provenance, SamplerSpec, TableFile

__all__ = ["CacheTable", "Provenance", "SamplerSpec", "named_tables"]


@dataclass(frozen=True, init=False)
class CacheTable:
    """The type of every step of a sampling run: immutable, and valid from the moment it exists.

    Args:
        timesteps: numbers >= 0 in execution order, strictly decreasing: those that the sampler gives its model, to the
            last bit. Whole ones become ints; numpy's and torch's scalars are taken too.
        step_types: one StepType (or its code) per timestep, the first NO_CACHE.
        eps_scale: the factor b on the predicted noise, in (0, 1].
        sampler: whose timesteps these are, if known.
        model: the sizes of the only model the table is for, ``dict(shape.fingerprint)``; None accepts any. Its
            in_channels are kept, and not compared.
        made: where the table comes from.
        allow_amplify: lets ``eps_scale`` exceed 1. The file keeps it, so that amplifying stays deliberate.

    Raises:
        TableError: one of these does not hold; the message names the field.
    """

    timesteps: tuple[float, ...]  # whole ones are ints
    step_types: tuple[StepType, ...]
    eps_scale: float
    sampler: SamplerSpec | None
    model: tuple[tuple[str, int], ...] | None  # sorted by name
    made: Provenance | None = field(hash=False)
    allow_amplify: bool

    def __init__(
        self,
        timesteps: Iterable[float],
        step_types: Iterable[int],
        eps_scale: float = 1.0,
        sampler: SamplerSpec | None = None,
        model: Mapping[str, int] | Iterable[tuple[str, int]] | None = None,
        made: Provenance | None = None,
        allow_amplify: bool = False,
    ) -> None:
        values = {
            "timesteps": exact_timesteps(timesteps),
            "step_types": tuple(_as_step_type(f"step_types[{i}]", s) for i, s in enumerate(step_types)),
            "eps_scale": _as_eps_scale(eps_scale, allow_amplify),
            "sampler": sampler,
            "model": None if model is None else _as_fingerprint(model),
            "made": made,
            "allow_amplify": bool(allow_amplify),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_steps()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a table from its file; TableError naming path and field where it is not exactly one."""
        return cls._from_file(Path(path))

    @classmethod
    def named(cls, name: str) -> Self:
        """One of the tables that come with the package; `named_tables` lists them."""
        if name not in named_tables():
            raise TableError(f"name: expected one of {', '.join(named_tables())}, got {name!r}")
        return cls._from_file(_shelf() / f"{name}.json")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that `load` reads: wholly or, with a TableError, not at all."""
        write_json(path, self.document())

    def document(self) -> dict[str, Any]:
        """The file, as a JSON object."""
        return {
            "format": TABLE_FORMAT,
            "schema": 1,
            "model": None if self.model is None else dict(self.model),
            "sampler": None if self.sampler is None else self.sampler.model_dump(),
            "timesteps": self.timesteps,
            "step_types": [step_type.name for step_type in self.step_types],
            "eps_scale": self.eps_scale,
            "allow_amplify": self.allow_amplify,
            "made": None if self.made is None else self.made.model_dump(),
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """The table that a JSON object is; TableError, naming the field, where it is not exactly one."""
        if document.get("format") == SET_FORMAT:
            raise TableError(
                f"format: expected {TABLE_FORMAT!r}, got {SET_FORMAT!r}, tables for several numbers of steps; load it "
                "with TableSet.load"
            )
        file = TableFile(**document)
        return cls(
            timesteps=file.timesteps,
            step_types=[StepType[name] for name in file.step_types],
            eps_scale=file.eps_scale,
            sampler=file.sampler,
            model=file.model,
            made=file.made,
            allow_amplify=file.allow_amplify,
        )

    @classmethod
    def _from_file(cls, source: Traversable) -> Self:
        with naming(source):
            return cls.from_document(read_json(source))

    @property
    def tables(self) -> tuple[Self]:
        """Itself, where a `TableSet` has several."""
        return (self,)

    def __len__(self) -> int:
        return len(self.timesteps)

    def step_type_at(self, timestep: float) -> StepType:
        """The type of the step that runs at ``timestep``; TableError where none does."""
        if timestep not in self.timesteps:
            raise TableError(f"timestep: expected one of the table's, {reprlib.repr(self.timesteps)}, got {timestep}")
        return self.step_types[self.timesteps.index(timestep)]

    def retime(self, timesteps: Iterable[float], sampler: SamplerSpec | None = None) -> Self:
        """The same step types at another sampler's ``timesteps``, step by step where they are as many.

        Where they are not, each step takes the type of the one that is as far into the run; the first stays NO_CACHE.
        What a calibration saw at each step is left out then. See docs/bundled_model.md for how near that comes to a
        table that is calibrated for so many steps.
        """
        exact = exact_timesteps(timesteps)
        if len(exact) == len(self):
            return replace(self, timesteps=exact, sampler=sampler)
        types = [self.step_types[i] for i in steps_as_far(len(self), len(exact))]
        made = self.made and self.made.moved_from(len(self))
        return replace(self, timesteps=exact, step_types=(StepType.NO_CACHE, *types[1:]), sampler=sampler, made=made)

    def check(self, shape: ModelShape, timesteps: Iterable[float]) -> None:
        """Raise TableError, naming what differs, unless the table is for this model and these timesteps."""
        self._check_model(shape)
        exact = exact_timesteps(timesteps)
        if len(exact) != len(self):
            raise TableError(
                f"timesteps: expected the table's {len(self)} steps, got {len(exact)}; use a table made for "
                f"{len(exact)} steps, or retime(timesteps)"
            )
        for i, (own, given) in enumerate(zip(self.timesteps, exact, strict=True)):
            if own != given:
                raise TableError(
                    f"timesteps[{i}]: expected the table's {own}, got {given}; "
                    "retime(timesteps) moves a table by step index"
                )

    def plan(self, shape: ModelShape) -> Plan:
        """The plan of a run on a model of this ``shape``; TableError where the table is for another one."""
        self._check_model(shape)
        return Plan.from_types(self.step_types, self.timesteps, shape.sites, self.eps_scale)

    def _check_model(self, shape: ModelShape) -> None:
        check_sizes(self.model, shape)
        check_origin(self.made, self.step_types, shape.branches)

    def _check_steps(self) -> None:
        lengths = {"step_types": len(self.step_types)}
        if self.sampler is not None:
            lengths["sampler.steps"] = self.sampler.steps
        if self.made is not None:
            lengths |= {f"made.errors.{name}": len(errors) for name, errors in self.made.errors.items()}
            lengths |= {f"made.votes.{name}": len(votes) for name, votes in self.made.votes.items()}
        for name, length in lengths.items():
            if length != len(self):
                raise TableError(f"{name}: expected {len(self)}, one per timestep, got {length}")
        if self.sampler is not None and self.timesteps[0] >= self.sampler.train_steps:
            raise TableError(
                f"timesteps[0]: expected less than sampler.train_steps, {self.sampler.train_steps}, "
                f"got {self.timesteps[0]}"
            )
        if self.step_types[0] is not StepType.NO_CACHE:
            raise TableError(
                f"step_types[0]: expected NO_CACHE, got {self.step_types[0].name}; "
                "the first executed step has nothing to reuse"
            )


def named_tables() -> tuple[str, ...]:
    """The names of the tables that come with the package, for `CacheTable.named`."""
    names = (entry.name for entry in _shelf().iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def _shelf() -> Traversable:
    return files("ebcache_fast") / "assets" / "tables"


def _as_int(name: str, value: object, highest: int = MAX_INT) -> int:
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number <= highest:
        raise TableError(f"{name}: expected an integer from 0 to {highest}, got {shown(value)}")
    return number


def _as_step_type(name: str, value: object) -> StepType:
    return StepType(_as_int(name, value, max(StepType)))


def _as_eps_scale(value: float, allow_amplify: bool) -> float:
    highest = sys.float_info.max if allow_amplify else 1.0
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= highest:
        raise TableError(
            f"eps_scale: expected a number above 0 and at most 1, got {shown(value)}; "
            "with allow_amplify it may be any finite number above 0"
        )
    return float(value)


def _as_fingerprint(model: Mapping[str, int] | Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, _as_int(f"model.{name}", size)) for name, size in dict(model).items()))
