"""Dry run of a table: how many steps of a run will hit, said beforehand, and what to do about the others."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ebcache_fast.dropin.enable import module_of
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import exact_timestep
from ebcache_fast.plan.table_set import Tables, tables_of
from ebcache_fast.sampling import plan_for

SHOWN = 6  # timesteps in a line, at most


@dataclass(frozen=True)
class DryCheck:
    """Forecast of each step of a run under a table; `print` says it in words."""

    steps: int  # that the run takes
    followed: int  # steps that are the plan's next
    hits: int  # of them, those that reuse something
    unplanned: tuple[float, ...]  # timesteps that are not in the plan
    planned: tuple[float, ...]  # those that are
    mac_limit: float  # the speed-up that the count of multiply-accumulates allows
    remedy: str | None  # what to do; None where every step is the plan's

    def __str__(self) -> str:
        said = f"{self.hits} of {self.steps} steps reuse something: {self.mac_limit:.2f}x at most by the MAC count"
        if self.unplanned:
            said += f"; not in the table, which has {_few(self.planned)}: {_few(self.unplanned)}"
        return said if self.remedy is None else f"{said}; {self.remedy}"


def dry_check(
    model: Any,
    table: Tables,
    steps: int | None = None,
    *,
    timesteps: Iterable[float] | None = None,
) -> DryCheck:
    """Say which steps of a run would follow ``table``, without running the model or enabling anything.

    Args:
        model: a pipeline, whose scheduler says the timesteps (a copy of it is asked); or a bare module.
        table: as for `enable`.
        steps: how many steps the pipeline is asked for; None means as many as the table has.
        timesteps: those of the run, in the order of its calls, in the scheduler's place; a tensor or an array too.

    Raises:
        InputError: there is no scheduler, or it does not take that many steps; or there are none.
        TableError: the table is for another model, or a timestep is no number.
    """
    shape = as_denoiser(denoiser_module := module_of(model)).shape
    plans = [plan_for(as_denoiser(denoiser_module), single) for single in tables_of(table)]
    asked = timesteps if timesteps is not None else _timesteps_of(model, len(plans[0]) if steps is None else steps)
    run = tuple(exact_timestep(f"timesteps[{i}]", t) for i, t in enumerate(asked))
    if not run:
        raise InputError(f"a run of no steps (steps={steps!r}) has nothing to check; ask for one or more")
    plan = next((plan for plan in plans if plan.timesteps == run), plans[0])
    is_followed = len(plans) == 1 or plan.timesteps == run  # of several tables all or nothing
    step_at, expected = {t: i for i, t in enumerate(plan.timesteps) if is_followed}, 0
    full, done, followed = plan.steps[0], [], 0
    for t in run:
        step = step_at.get(t)
        is_next = step is not None and step == (expected if step else 0)
        followed += is_next
        done.append(plan.steps[step] if is_next and step is not None else full)
        expected = expected if step is None else step + 1
    uncached = len(run) * max(plan.step_macs(shape))
    reads = dict(zip(plan.steps, plan.reading, strict=True))
    costs = dict(zip(plan.steps, plan.step_macs(shape), strict=True))
    macs = sum(costs[step_plan] for step_plan in done)
    return DryCheck(
        steps=len(run),
        followed=followed,
        hits=sum(reads[step_plan] for step_plan in done),
        unplanned=tuple(t for t in run if t not in step_at),
        planned=plan.timesteps,
        mac_limit=uncached / macs,
        remedy=None if followed == len(run) else _remedy(run, timesteps is None),
    )


def _timesteps_of(model: Any, steps: int) -> tuple[float, ...]:
    scheduler = copy.deepcopy(getattr(model, "scheduler", None))
    if scheduler is None:
        raise InputError(f"{type(model).__name__} has no scheduler; pass timesteps=, those of the run in its order")
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:  # whatever a scheduler makes of it
        raise InputError(
            f"{type(scheduler).__name__} does not take {steps!r} steps as it is ({error}); pass timesteps="
        ) from error
    return tuple(scheduler.timesteps.tolist())


def _remedy(run: tuple[float, ...], has_scheduler: bool) -> str:
    if len(set(run)) < len(run):
        return "a sampler that visits timesteps twice computes them in full the second time"
    asked = "pipe.scheduler.timesteps.tolist()" if has_scheduler else "timesteps"
    return f"move the table there: table.retime({asked}), after scheduler.set_timesteps({len(run)})"


def _few(timesteps: tuple[float, ...]) -> str:
    shown = ", ".join(f"{t:g}" for t in timesteps[:SHOWN])
    return shown + (f", ... ({len(timesteps)})" if len(timesteps) > SHOWN else "")
