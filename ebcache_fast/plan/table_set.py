"""TableSet: the Cache Tables of one model for several numbers of steps, or samplers, in one file."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ebcache_fast.errors import TableError
from ebcache_fast.plan import Plan
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.plan.table_file import naming, read_json, write_json
from ebcache_fast.plan.table_schema import SET_FORMAT, TABLE_FORMAT, TableSetFile

__all__ = ["TableSet", "Tables", "load_tables", "tables_of"]


@dataclass(frozen=True, init=False)
class TableSet:
    """Cache Tables of which a run follows the one that has its timesteps: immutable.

    Raises TableError, naming the table, without one, for anything that is no CacheTable, and for two of the same
    timesteps.
    """

    tables: tuple[CacheTable, ...]

    def __init__(self, tables: Iterable[CacheTable]) -> None:
        object.__setattr__(self, "tables", tuple(tables))
        if not self.tables:
            raise TableError("tables: expected at least one, got none")
        seen: dict[tuple[float, ...], int] = {}
        for i, table in enumerate(self.tables):
            if not isinstance(table, CacheTable):
                raise TableError(f"tables[{i}]: expected a CacheTable, got a {type(table).__name__}")
            if (first := seen.setdefault(table.timesteps, i)) != i:
                raise TableError(
                    f"tables[{i}]: expected other timesteps than tables[{first}] has, got the same {len(table)} from "
                    f"{table.timesteps[0]} to {table.timesteps[-1]}; leave one of them out"
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a set from its file; TableError naming path and field where it is not exactly one."""
        with naming(path):
            return cls.from_document(read_json(Path(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that `load` reads: wholly or, with a TableError, not at all."""
        tables = [table.document() for table in self.tables]
        write_json(path, {"format": SET_FORMAT, "schema": 1, "tables": tables})

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """The set that a JSON object is; TableError, naming the field, where it is not exactly one."""
        if document.get("format") == TABLE_FORMAT:
            raise TableError(
                f"format: expected {SET_FORMAT!r}, got {TABLE_FORMAT!r}, one table; load it with CacheTable.load"
            )
        tables = []
        for i, table in enumerate(TableSetFile(**document).tables):
            with naming(f"tables[{i}]"):
                tables.append(CacheTable.from_document(table))
        return cls(tables)

    def __len__(self) -> int:
        return len(self.tables)

    def __iter__(self) -> Iterator[CacheTable]:
        return iter(self.tables)

    def of_steps(self, steps: int | None) -> CacheTable:
        """The only table of so many steps; TableError where none has, or several have."""
        found = [table for table in self.tables if len(table) == steps]
        if len(found) != 1:
            raise TableError(
                f"steps: expected one of {', '.join(map(str, sorted(map(len, self.tables))))}, each of one table, got "
                f"{steps}; say how many steps, or take one of the tables out of the set"
            )
        return found[0]


Tables = CacheTable | Plan | TableSet | list[CacheTable] | tuple[CacheTable, ...]  # what a model can be enabled with


def tables_of(tables: Tables) -> tuple[CacheTable | Plan, ...]:
    """The tables one by one, of one or several; TableError for a list or tuple that can be no TableSet."""
    several = TableSet(tables) if isinstance(tables, list | tuple) else tables
    return several.tables if isinstance(several, TableSet) else (several,)


def load_tables(path: str | os.PathLike[str]) -> CacheTable | TableSet:
    """The table, or the set of them, that a file holds; TableError as their own ``load`` says."""
    with naming(path):
        document = read_json(Path(path))
        kind = TableSet if document.get("format") == SET_FORMAT else CacheTable
        return kind.from_document(document)
