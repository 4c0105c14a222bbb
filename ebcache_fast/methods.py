"""Methods by name, as people write them on a command line: ``no-cache``, ``fora:2``, ``steps:33``, ``table:FILE``."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ebcache_fast.cache_table import CacheTable
from ebcache_fast.compare import Method
from ebcache_fast.errors import EBCacheError, InputError
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.policies import fora
from ebcache_fast.samplers import make_sampler


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share."""

    shape: ModelShape
    steps: int
    sampler: str

    def uncached(self, steps: int) -> Plan:
        """Every step computes everything, ``steps`` of them."""
        branches = tuple(cost.branch for cost in self.shape.branches)
        return Plan.uncached(make_sampler(self.sampler, steps).timesteps, self.shape.depth, branches)


def parse_method(text: str, setting: Setting) -> Method:
    """The method that ``text`` names; InputError, listing the known ones, for an unknown one or a bad argument."""
    name, _, argument = text.partition(":")
    if name not in METHODS:
        raise InputError(f"method {text!r} is unknown; choose from {', '.join(USAGES)}")
    try:
        return METHODS[name](argument, setting)
    except EBCacheError:
        raise
    except ValueError as error:
        raise InputError(f"method {text!r}: {error}; write it as one of {', '.join(USAGES)}") from None


def open_table(text: str) -> CacheTable:
    """A table file, or one of the named tables that come with the package."""
    return CacheTable.load(text) if Path(text).suffix == ".json" else CacheTable.named(text)


def _no_cache(argument: str, setting: Setting) -> Method:
    if argument:
        raise ValueError("it takes no argument")
    return Method(f"No cache, {setting.steps} steps", setting.uncached(setting.steps), setting.sampler)


def _fora(argument: str, setting: Setting) -> Method:
    timesteps = setting.uncached(setting.steps).timesteps
    return Method(f"FORA, N={argument}", fora(timesteps, float(argument), setting.shape), setting.sampler)


def _steps(argument: str, setting: Setting) -> Method:
    return Method(f"{argument} steps", setting.uncached(int(argument)), setting.sampler)


def _eps_scale(argument: str, setting: Setting) -> Method:
    b = float(argument)
    if not 0 < b <= 1:
        raise ValueError("b is outside (0, 1]")
    plan = dataclasses.replace(setting.uncached(setting.steps), eps_scale=b)
    return Method(f"Epsilon scaling, b={argument}", plan, setting.sampler)


def _table(argument: str, setting: Setting) -> Method:
    table = open_table(argument)
    sampler = setting.sampler if table.sampler is None else table.sampler.name
    return Method(f"Table {argument}", table.plan(setting.shape), sampler)


METHODS: Final[Mapping[str, Callable[[str, Setting], Method]]] = MappingProxyType(
    {"no-cache": _no_cache, "table": _table, "fora": _fora, "steps": _steps, "eps-scale": _eps_scale}
)
USAGES = ("no-cache", "table:FILE_OR_NAME", "fora:N", "steps:N", "eps-scale:B")
