"""The keys of a Cache Table's file, each of them held to its type."""

import math
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from ebcache_fast.errors import TableError
from ebcache_fast.plan import MAX_INT, shown
from ebcache_fast.plan.table_file import key_shown

TABLE_FORMAT: Final = "ebcache-fast.cache-table"
SET_FORMAT: Final = "ebcache-fast.cache-tables"
MAX_LAYERS = 10_000


class _Record(BaseModel):
    """A frozen, strict piece of the file; what is wrong with it is a TableError that names the field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise TableError(_first_problem(error)) from None


def _scalar(value: object) -> object:
    match value:
        case None | str():
            return value
        case float() if math.isfinite(value):
            return value
        case int() if abs(value) <= MAX_INT:  # bools too
            return value
    raise ValueError("Input should be a finite number, a string, a boolean or null")


def _timestep(value: object) -> object:
    if type(value) in (int, float) and 0 <= value <= MAX_INT:  # type: ignore[operator]
        return value
    raise ValueError(f"Input should be a number from 0 to {MAX_INT}")


_Item = TypeVar("_Item")
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Timestep = Annotated[float, PlainValidator(_timestep)]  # an int where it is whole
Mismatch = Annotated[float, Field(ge=0)]
Scalar = Annotated[bool | int | float | str | None, PlainValidator(_scalar)]
StepName = Literal[
    "NO_CACHE",
    "ATTENTION",
    "ATTN_MLP",
    "MLP",
    "SELF_ATTENTION",
    "CROSS_ATTENTION",
    "SELF_ATTN_MLP",
    "CROSS_ATTN_MLP",
]
PerStep = Annotated[tuple[_Item, ...], Field(strict=False)]  # JSON only has lists; the items stay strict


class SamplerSpec(_Record):
    """The sampler that a table's timesteps belong to: ``steps`` out of its ``train_steps``."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_.+-]*$")
    steps: Count
    train_steps: Count


class Provenance(_Record):
    """Origin of a table: ``by`` whom or what, from which ``source``, with which ``options`` it was made.

    A calibration also keeps what it saw at each step: the mean ``errors`` of every candidate (None where it
    was not tried) and the number of ``votes`` for every step type.
    """

    by: str
    source: str
    options: dict[str, Scalar] = {}
    errors: dict[StepName | Literal["FORECAST"], PerStep[Mismatch | None]] = {}
    votes: dict[StepName, PerStep[Count]] = {}

    def moved_from(self, steps: int) -> Self:
        """The origin of a table moved to another number of steps: without what was seen at each of its ``steps``."""
        moved = {"options": {**self.options, "retimed_from_steps": steps}, "errors": {}, "votes": {}}
        return self.model_copy(update=moved)


class AnyTableFile(_Record):
    """Keys that the file of a table has in either version."""

    format: Literal["ebcache-fast.cache-table"]  # TABLE_FORMAT
    model: dict[str, Count] | None
    sampler: SamplerSpec | None
    timesteps: PerStep[Timestep]
    eps_scale: float
    allow_amplify: bool
    made: Provenance | None


class TableFile(AnyTableFile):
    """The file, key by key: every key must be there, and no other. Sequences stand in execution order."""

    version: int = Field(alias="schema", ge=1, le=1)
    step_types: PerStep[StepName]


class Layers(_Record):
    """Layers that run the same branches, in this order."""

    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    branches: PerStep[Literal["SELF_ATTN", "CROSS_ATTN", "MLP"]]


class SitedTableFile(AnyTableFile):
    """The file of a table whose sites differ (version 2); `table_steps` reads sites, kinds and steps.

    Corrections may be left out.
    """

    version: int = Field(alias="schema", ge=2, le=2)
    sites: PerStep[Layers]
    kinds: dict[str, dict[str, Scalar]]
    steps: PerStep[str]
    corrections: PerStep[Annotated[tuple[float, float], Field(strict=False)]] = ()


class TableSetFile(_Record):
    """The file of several tables, key by key; each of them is a `TableFile`."""

    format: Literal["ebcache-fast.cache-tables"]  # SET_FORMAT
    version: int = Field(alias="schema", ge=1, le=1)
    tables: Annotated[tuple[dict[str, Any], ...], Field(strict=False)]


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    steps = (f"[{step}]" if isinstance(step, int) else f".{key_shown(step)}" for step in first["loc"])
    name = "".join(steps).lstrip(".")
    match first["type"]:
        case "missing":
            return f"{name}: missing; every key must be there"
        case "extra_forbidden":
            return f"{name}: unknown key; leave it out"
    cause = first.get("ctx", {}).get("error", first["msg"])
    if isinstance(cause, TableError):  # of a record inside this one
        return f"{name}.{cause}"
    return f"{name}: {str(cause).replace('Input should be', 'expected')}, got {shown(first['input'])}"
