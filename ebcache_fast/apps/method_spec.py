"""Methods as people write them on a command line: ``no-cache``, ``fora:2``, ``table:FILE``, a function of theirs."""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Final

from ebcache_fast.apps.compare import Method
from ebcache_fast.errors import EBCacheError, InputError, TableError
from ebcache_fast.models.router_file import read_router
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.plan.table import CacheTable, named_tables
from ebcache_fast.plan.table_file import is_npy, naming
from ebcache_fast.plan.table_set import TableSet, load_tables
from ebcache_fast.policies import BUILT_IN
from ebcache_fast.policies.eps_scaling import eps_scaling_of
from ebcache_fast.policies.l2c import THRESHOLD, l2c
from ebcache_fast.policies.registry import POLICIES, Policy
from ebcache_fast.samplers import make_sampler, sampler_over
from ebcache_fast.samplers.schedule import TRAIN_STEPS, NoiseSchedule


@dataclasses.dataclass(frozen=True)
class Setting:
    """Setting that all methods of a comparison share."""

    shape: ModelShape
    steps: int
    sampler: str

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the sampler for so many steps."""
        return make_sampler(self.sampler, self.steps).timesteps

    def uncached(self, steps: int) -> Plan:
        """The plan of ``steps`` steps that all compute everything."""
        return Plan.uncached(make_sampler(self.sampler, steps).timesteps, self.shape.sites)


def parse_method(text: str, setting: Setting) -> Method:
    """The method that ``text`` names; InputError, listing the known ones, for an unknown one or a bad argument.

    What can't be made of a good one raises its own EBCacheError, which names the method too.
    ``MODULE:FUNCTION`` and ``FILE.py:FUNCTION`` are methods of the user's own: the function is called with the
    timesteps, in execution order, and the model's ModelShape, and returns a Plan or a CacheTable. Its code is run.
    So is that of ``NAME`` or ``NAME:ARGUMENT`` where a package registered a policy of this name; it gets the argument
    too, as it is written.
    """
    name, _, argument = text.rpartition(":") if ".py:" in text else text.partition(":")
    try:
        if not argument and name in _WITH_ARGUMENT:
            raise ValueError(f"it takes an argument, as {_WITH_ARGUMENT[name]}")
        if name in METHODS:
            return METHODS[name](argument, setting)
        if name in BUILT_IN:
            return Method(text, BUILT_IN[name](setting.timesteps, setting.shape, argument), setting.sampler)
        if (policy := _policy(text, name, argument)) is not None:
            return _called(text, text, _with(policy, argument), setting)
        return _called(text, f"{argument} of {name}", partial(_own, name, argument), setting)
    except EBCacheError as error:
        if not str(error).startswith(f"method {text!r}"):
            error.args = (f"method {text!r}: {error}",)
        raise
    except ValueError as error:
        raise InputError(f"method {text!r}: {error}; write it as one of {', '.join(USAGES)}") from None


def default_methods(setting: Setting) -> tuple[str, ...]:
    """Methods of a comparison where none is named.

    No caching first, then the package's tables for this very setting, FORA, fewer steps, and scaled epsilons.
    """
    bound = tuple(sorted(setting.shape.sizes)), setting.sampler, setting.steps
    tables = ((name, CacheTable.named(name)) for name in named_tables())
    fitting = [
        f"table:{name}"
        for name, table in tables
        if table.sampler is not None and (table.model, table.sampler.name, table.sampler.steps) == bound
    ]
    fewer = {round(setting.steps * share): None for share in (2 / 3, 0.4)}
    steps = [f"steps:{count}" for count in fewer if 0 < count < setting.steps]
    return ("no-cache", *fitting, "fora:2", "fora:3", *steps, "eps-scale:0.98")


def open_tables(text: str) -> CacheTable | TableSet:
    """A file of one table or several, whatever its suffix, or a named table of the package; TableError for all else."""
    if os.path.isfile(text):
        if is_npy(text):
            raise TableError(f"{text} is a .npy array; ebcache-fast table import makes a table of it")
        return load_tables(text)
    if text in named_tables():
        return CacheTable.named(text)
    if Path(text).suffix == ".json" or os.sep in text:
        return load_tables(text)  # which says why it can't be read
    raise TableError(f"table: expected a file, or one of {', '.join(named_tables())}, got {text!r}")


def open_table(text: str, steps: int | None = None) -> CacheTable:
    """Open one table as `open_tables` does; of several, the one of so many steps.

    Raises TableError, naming it, where the file has none.
    """
    opened = open_tables(text)
    if isinstance(opened, CacheTable):
        return opened
    with naming(text):
        return opened.of_steps(steps)


def _no_cache(argument: str, setting: Setting) -> Method:
    if argument:
        raise ValueError("it takes no argument")
    return Method(f"No cache, {setting.steps} steps", setting.uncached(setting.steps), setting.sampler)


def _steps(argument: str, setting: Setting) -> Method:
    return Method(f"{argument} steps", setting.uncached(int(argument)), setting.sampler)


def _eps_scale(argument: str, setting: Setting) -> Method:
    plan = eps_scaling_of(setting.timesteps, setting.shape, argument)
    return Method(f"Epsilon scaling, b={argument.replace(':', ' to ')}", plan, setting.sampler)


def _table(argument: str, setting: Setting) -> Method:
    return Method(
        f"Table {argument}", _plan_of(open_table(argument, setting.steps), argument, setting), setting.sampler
    )


def _l2c(argument: str, setting: Setting) -> Method:
    """A released router, of a FILE or, with a threshold, FILE:THRESHOLD."""
    path, threshold = argument, THRESHOLD
    if not os.path.exists(argument) and ":" in argument:
        path, _, number = argument.rpartition(":")
        threshold = float(number)
    scores = read_router(path)
    if len(scores) != setting.steps:
        raise TableError(f"{path}: expected a router of {setting.steps} steps, got one of {len(scores)}")
    plan = l2c(setting.timesteps, setting.shape, scores, threshold)
    return Method(f"L2C {Path(path).name}", plan, setting.sampler)


def _policy(text: str, name: str, argument: str) -> Policy | None:
    """The registered policy of this name; None where the text may name a function instead."""
    try:
        return POLICIES.find(name)
    except TableError as error:
        if argument.isidentifier():
            return None
        raise InputError(f"method {text!r} is unknown; choose from {', '.join(USAGES)}; {error}") from None


def _with(policy: Policy, argument: str) -> Policy:
    return (lambda timesteps, shape: policy(timesteps, shape, argument)) if argument else policy


def _own(name: str, function: str, timesteps: tuple[int, ...], shape: ModelShape) -> object:
    """Call a function of the user's own, named by module or file."""
    try:
        module = _module(name)
    except ModuleNotFoundError as error:  # perhaps it was to be a policy, of a package that is broken
        raise ModuleNotFoundError("; ".join([str(error), *POLICIES.plugin_problems])) from error
    return getattr(module, function)(timesteps, shape)


def _called(text: str, title: str, policy: Policy, setting: Setting) -> Method:
    """The method that other people's code makes."""
    try:
        plan = policy(setting.timesteps, setting.shape)
    except (Exception, SystemExit) as error:  # whatever it raises
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"method {text!r}: {type(error).__name__}: {first:.300}; name a function (timesteps, shape) -> Plan of a "
            f"module that Python finds or of a FILE.py, or choose from {', '.join(USAGES)}"
        ) from error
    if not isinstance(plan, Plan | CacheTable):
        raise InputError(f"method {text!r}: it returns {type(plan).__name__!r}; return a Plan or a CacheTable")
    return Method(title, _plan_of(plan, text, setting), setting.sampler)


def _module(name: str) -> ModuleType:
    """The module of this name, one in the current folder too, or that of a file."""
    if not name.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove("")
    spec: Any = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _plan_of(table: CacheTable | Plan, name: str, setting: Setting) -> Plan:
    """The table's plan, once it is known to fit the model and to be for the sampler of all methods; else TableError."""
    plan = table.plan(setting.shape) if isinstance(table, CacheTable) else table
    plan.macs(setting.shape)  # raises where the plan is for another model
    spec = table.sampler if isinstance(table, CacheTable) else None
    if spec is not None and (spec.name, spec.train_steps) != (setting.sampler, TRAIN_STEPS):
        raise TableError(
            f"table {name!r} is for the sampler {spec.name!r} over {spec.train_steps} training steps, and all methods "
            f"are run by {setting.sampler!r} over {TRAIN_STEPS}, since only then their noise is the same; "
            f"pass --sampler {spec.name}, or retime(timesteps) the table"
        )
    sampler_over(setting.sampler, NoiseSchedule.linear().respace(plan.timesteps))  # or timesteps that there are not
    return plan


METHODS: Final[Mapping[str, Callable[[str, Setting], Method]]] = MappingProxyType(
    {"no-cache": _no_cache, "table": _table, "steps": _steps, "eps-scale": _eps_scale, "l2c": _l2c}
)
_WITH_ARGUMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "steps": "steps:N",
        "eps-scale": "eps-scale:B",
        "l2c": "l2c:FILE",
        **{name: f"{name}:{[*inspect.signature(policy).parameters][-1].upper()}" for name, policy in BUILT_IN.items()},
    }
)
USAGES: Final = ("no-cache", "table:FILE_OR_NAME", *_WITH_ARGUMENT.values(), "MODULE:FUNCTION", "FILE.py:FUNCTION")
