"""Policies at budgets: for each speed-up the methods of that cost, what needs the model calibrated first."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from torch import nn

from ebcache_fast.apps.compare import Method
from ebcache_fast.apps.method_spec import Setting
from ebcache_fast.calibration.search import calibrate
from ebcache_fast.errors import InputError
from ebcache_fast.plan import Plan
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.policies.at_cost import FAMILIES, at_cost
from ebcache_fast.samplers import make_sampler

CALIBRATED: Final = ("path", "algorithm1")
FEWER, SOLVER = "steps", "dpm-solver++"
ALL: Final = (*CALIBRATED, *FAMILIES, FEWER, SOLVER)
VOTES = 208  # of Algorithm 1: a comparison is not to wait for a thousand

Calibrate = Callable[[str, float], CacheTable]


def policies_of(names: Sequence[str], sampler: str) -> tuple[str, ...]:
    """The policies of these names, each once; "all" means all that can be held against each other under a sampler.

    Raises InputError, listing the known ones, for an unknown name.
    """
    if unknown := next((name for name in names if name not in (*ALL, "all")), None):
        raise InputError(f"policy {unknown!r} is unknown; choose all, or from {', '.join(ALL)}")
    found = dict.fromkeys(single for name in names for single in (ALL if name == "all" else (name,)))
    if sampler != "ddim" and "all" in names:
        found.pop(SOLVER)  # its samples begin with the same noise and go elsewhere
    return tuple(found)


def check_budgets(budgets: Sequence[float]) -> None:
    """Raise InputError unless all are speed-ups: finite, and 1 or more."""
    if any(not 1 <= (wrong := budget) < float("inf") for budget in budgets):
        raise InputError(f"budget={wrong:g} is below 1; give speed-ups over no caching, such as 1.5 and 2.5")


def methods_at(names: Sequence[str], budgets: Sequence[float], setting: Setting, tables: Calibrate) -> list[Method]:
    """No caching, then at each budget every policy of these names.

    tables: makes the table of a calibrated one. Raises InputError for a budget below 1, TableError where a policy can't
    come near one.
    """
    check_budgets(budgets)
    uncached = setting.uncached(setting.steps)
    whole = uncached.macs(setting.shape)
    methods = [Method(f"No cache, {setting.steps} steps", uncached, setting.sampler)]
    for budget in budgets:
        for name in names:
            if name in CALIBRATED:
                plan = tables(name, budget).plan(setting.shape)
            elif name in FAMILIES:
                plan = at_cost(name, setting.timesteps, whole / budget, setting.shape)
            else:
                methods.append(_fewer(name, budget, setting))
                continue
            methods.append(Method(f"{name}, {budget:g}x", plan, setting.sampler))
    return methods


def _fewer(name: str, budget: float, setting: Setting) -> Method:
    steps, sampler = max(1, round(setting.steps / budget)), SOLVER if name == SOLVER else setting.sampler
    title = f"{steps} steps" if name == FEWER else f"{steps} of {SOLVER}"
    return Method(title, Plan.uncached(make_sampler(sampler, steps).timesteps, setting.shape.sites), sampler)


def calibrated(model: nn.Module, setting: Setting, cfg_scale: float, folder: Path | None) -> Calibrate:
    """Maker of calibrated tables for `methods_at`: those in ``folder`` are taken, and new ones left there."""

    def make(name: str, budget: float) -> CacheTable:
        file = None if folder is None else folder / f"{name}-{setting.sampler}-{setting.steps}-{budget:g}x.json"
        if file is not None and file.exists():
            table = CacheTable.load(file)
            table.check(setting.shape, setting.timesteps)
            return table
        progress = None if file is None or name != "path" else file.with_name(f"path-{setting.steps}.progress.json")
        table = calibrate(
            model,
            method=name,
            samples=None if name == "path" else VOTES,
            steps=setting.steps,
            sampler=setting.sampler,
            cfg_scale=cfg_scale,
            target_speedup=budget,
            progress_file=progress,
        )
        if file is not None:
            table.save(file)
        return table

    return make
