"""CacheTable: what runs at each timestep and what is reused, and the one strict JSON format that says it."""

import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self

from ebcache_fast.errors import TableError
from ebcache_fast.plan import ModelShape, Plan, StepPlan, StepType, exact_timesteps
from ebcache_fast.plan.correction import Correction, as_corrections
from ebcache_fast.plan.retiming import steps_as_far
from ebcache_fast.plan.table_checks import as_eps_scale, as_sizes, as_step_types, check_first, check_lengths
from ebcache_fast.plan.table_file import Rows, naming, read_json, write_json
from ebcache_fast.plan.table_fit import check_origin, check_sites, check_sizes
from ebcache_fast.plan.table_schema import (
    SET_FORMAT,
    TABLE_FORMAT,
    Provenance,
    SamplerSpec,
)
from ebcache_fast.plan.table_steps import arguments_of, spelt

__all__ = ["CacheTable", "Provenance", "SamplerSpec", "named_tables"]


@dataclass(frozen=True, init=False)
class CacheTable:
    """The type of every step of a sampling run: immutable, and valid from the moment it exists.

    Args:
        timesteps: numbers >= 0 in execution order, strictly decreasing: those that the sampler gives its model, to the
            last bit. Whole ones become ints; numpy's and torch's scalars are taken too.
        step_types: one StepType (or its code) per timestep, the first NO_CACHE; with ``step_plans`` theirs, None for
            each that fits no type.
        eps_scale: the factor b on the predicted noise, in (0, 1].
        sampler: whose timesteps these are, if known.
        model: the sizes of the only model the table is for, ``dict(shape.sizes)``; None accepts any. Its
            in_channels are kept, and not compared.
        made: where the table comes from.
        allow_amplify: lets ``eps_scale`` exceed 1. The file keeps it, so that amplifying stays deliberate.
        step_plans: what each step does at each site, for a model of exactly these sites; None where the types say it
            all, for any model. `from_plan` gives them.
        corrections: of the predicted noise, `Correction` or a pair for each step; none is neutral. Only with
            ``step_plans``.

    Raises:
        TableError: one of these does not hold; the message names the field.
    """

    timesteps: tuple[float, ...]  # whole ones are ints
    step_types: tuple[StepType | None, ...]
    eps_scale: float
    sampler: SamplerSpec | None
    model: tuple[tuple[str, int], ...] | None  # sorted by name
    made: Provenance | None = field(hash=False)
    allow_amplify: bool
    step_plans: tuple[StepPlan, ...] | None
    corrections: tuple[Correction, ...]

    def __init__(
        self,
        timesteps: Iterable[float],
        step_types: Iterable[int | None],
        eps_scale: float = 1.0,
        sampler: SamplerSpec | None = None,
        model: Mapping[str, int] | Iterable[tuple[str, int]] | None = None,
        made: Provenance | None = None,
        allow_amplify: bool = False,
        step_plans: Iterable[StepPlan] | None = None,
        corrections: Iterable[tuple[float, float]] = (),
    ) -> None:
        steps = None if step_plans is None else tuple(step_plans)
        exact = exact_timesteps(timesteps)
        values = {
            "timesteps": exact,
            "step_types": as_step_types(step_types, steps),
            "eps_scale": as_eps_scale(eps_scale, allow_amplify),
            "sampler": sampler,
            "model": None if model is None else as_sizes(model),
            "made": made,
            "allow_amplify": bool(allow_amplify),
            "step_plans": steps,
            "corrections": as_corrections(corrections, len(exact)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        check_lengths(self.timesteps, self.step_types, sampler, made)
        if steps is None:
            check_first(self.step_types)
            if self.corrections:
                raise TableError("corrections: expected step_plans with them; CacheTable.from_plan(plan) gives both")
        else:
            Plan(steps, self.timesteps, self.eps_scale)  # or steps that read what none stored
            spelt(steps)  # or rules that no file can name

    @classmethod
    def from_plan(
        cls,
        plan: Plan,
        *,
        sampler: SamplerSpec | None = None,
        model: Mapping[str, int] | Iterable[tuple[str, int]] | None = None,
        made: Provenance | None = None,
        allow_amplify: bool = False,
    ) -> Self:
        """The table whose `plan` is this one on a model of its sites.

        A plan that has a type for each step is a table of these types, for any model unless ``model`` says which.
        Raises TableError as the class does, and for a rule that `plan.registry.register_rule` has not named.
        """
        types = [step.step_type for step in plan.steps]
        return cls(
            plan.timesteps,
            types,
            plan.eps_scale,
            sampler=sampler,
            model=model,
            made=made,
            allow_amplify=allow_amplify,
            step_plans=plan.steps if None in types or plan.corrections else None,
            corrections=plan.corrections,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a table from its file; TableError naming path and field where it is not exactly one."""
        return cls._from_file(Path(path))

    @classmethod
    def named(cls, name: str) -> Self:
        """Read one of the tables that come with the package; TableError unless `named_tables` lists its name."""
        if name not in named_tables():
            raise TableError(f"name: expected one of {', '.join(named_tables())}, got {name!r}")
        return cls._from_file(_shelf() / f"{name}.json")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that `load` reads: wholly or, with a TableError, not at all."""
        write_json(path, self.document())

    def document(self) -> dict[str, Any]:
        """The file, as a JSON object: of version 2 where types do not say what each step does, else of 1."""
        steps = self.step_plans
        return {
            "format": TABLE_FORMAT,
            "schema": 1 if steps is None else 2,
            "model": None if self.model is None else dict(self.model),
            "sampler": None if self.sampler is None else self.sampler.model_dump(),
            "timesteps": self.timesteps,
            **({"step_types": self.type_names} if steps is None else spelt(steps)),
            **({"corrections": Rows(self.corrections)} if self.corrections else {}),
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
        return cls(**arguments_of(document))

    @classmethod
    def _from_file(cls, source: Traversable) -> Self:
        with naming(source):
            return cls.from_document(read_json(source))

    @property
    def tables(self) -> tuple[Self]:
        """Tuple of this one table, as a `TableSet` has several."""
        return (self,)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def type_names(self) -> list[str]:
        """The name of each step's type, or of what it does where it fits none; see `StepPlan.type_name`."""
        if self.step_plans is not None:
            return [step.type_name for step in self.step_plans]
        return [step_type.name for step_type in self.step_types if step_type is not None]

    def step_type_at(self, timestep: float) -> StepType | None:
        """The type of the step that runs at ``timestep``, None where it fits none; TableError where none does."""
        if timestep not in self.timesteps:
            raise TableError(f"timestep: expected one of the table's, {reprlib.repr(self.timesteps)}, got {timestep}")
        return self.step_types[self.timesteps.index(timestep)]

    def retime(self, timesteps: Iterable[float], sampler: SamplerSpec | None = None) -> Self:
        """Move the table to another sampler's ``timesteps``: the same steps, one by one where they are as many.

        Where they are not, each step does what the one does that is as far into the run; the first stays the first.
        What a calibration saw at each step is left out then, and corrections wherever the timesteps are others, as they
        were fitted for one sampler's. See docs/bundled_model.md for how near that comes to a table that is calibrated
        for so many steps.
        """
        exact = exact_timesteps(timesteps)
        if len(exact) == len(self):
            return replace(
                self,
                timesteps=exact,
                sampler=sampler,
                corrections=self.corrections if exact == self.timesteps else (),
            )
        sources = steps_as_far(len(self), len(exact))
        return replace(
            self,
            timesteps=exact,
            step_types=tuple(self.step_types[i] for i in sources),
            sampler=sampler,
            made=self.made and self.made.moved_from(len(self)),
            step_plans=None if self.step_plans is None else tuple(self.step_plans[i] for i in sources),
            corrections=(),
        )

    def check(self, shape: ModelShape, timesteps: Iterable[float]) -> None:
        """Raise TableError, naming what differs, unless the table is for this model and these timesteps."""
        self._check_model(shape)
        exact = exact_timesteps(timesteps)
        if len(exact) != len(self):
            raise TableError(
                f"timesteps: expected the table's {len(self)} steps, got {len(exact)}; use a table made for "
                f"{len(exact)} steps, or retime(timesteps)"
            )
        for i, (own, asked) in enumerate(zip(self.timesteps, exact, strict=True)):
            if own != asked:
                raise TableError(
                    f"timesteps[{i}]: expected the table's {own}, got {asked}; "
                    "retime(timesteps) moves a table by step index"
                )

    def plan(self, shape: ModelShape) -> Plan:
        """The plan of a run on a model of this ``shape``; TableError where the table is for another one."""
        self._check_model(shape)
        if self.step_plans is not None:
            return Plan(self.step_plans, self.timesteps, self.eps_scale, self.corrections)
        types = [step_type for step_type in self.step_types if step_type is not None]
        return Plan.from_types(types, self.timesteps, shape.sites, self.eps_scale)

    def _check_model(self, shape: ModelShape) -> None:
        check_sizes(self.model, shape)
        if self.step_plans is not None:
            check_sites(self.step_plans[0].sites, shape)
        check_origin(self.made, self.step_types, shape.branches)


def named_tables() -> tuple[str, ...]:
    """The names of the tables that come with the package, for `CacheTable.named`."""
    names = (entry.name for entry in _shelf().iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def _shelf() -> Traversable:
    return files("ebcache_fast") / "assets" / "tables"
