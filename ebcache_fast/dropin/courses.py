"""Choice among several plans: the pipeline's scheduler says it, or a run's first timestep."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, Self
from weakref import ref

from torch import nn

from ebcache_fast.dropin.output_change import OutputChange
from ebcache_fast.errors import InputError, TableError
from ebcache_fast.plan import Plan


class Course(NamedTuple):
    """A plan to go by, and what to do to outputs, which the engine can't."""

    plan: Plan
    change: OutputChange | None = None
    is_followed: bool = True  # else every step computes everything

    @classmethod
    def of(cls, target: Any, module: nn.Module, plan: Plan) -> Self:
        """The course of a plan for a pipeline, or a module alone; InputError where its b can't be applied.

        TableError for a plan whose first step can't stand in for any other: calls may come in another order.
        """
        if plan.refill is None:
            raise TableError(
                "steps[0]: expected a step that keeps all that later ones read, which here stands in for any step that "
                "comes out of order; keep it there, or run such a plan with ebcache_fast.sample"
            )
        change = OutputChange.of(target, module, plan)
        if change is None:
            return cls(plan)
        eps_scale = plan.eps_scale if change.alpha_bar is None else 1.0
        return cls(replace(plan, eps_scale=eps_scale, corrections=()), change)


class Choice(Protocol):
    """Choice of the course that is taken now."""

    def at(self, t: float | None) -> Course:
        """The course of a call at timestep t; None where that is not known yet."""
        ...


def choice_of(target: Any, courses: Sequence[Course], *, in_order: bool) -> Choice | None:
    """The choice for a pipeline, or a module alone; None where there is nothing to choose.

    InputError where nothing tells which course a run takes.
    """
    if len(courses) == 1:
        return None
    if hasattr(target, "scheduler"):
        return ByScheduler(target, courses)
    remedy = "enable its pipeline, whose scheduler says which table a run follows, or one table alone"
    if in_order:
        raise InputError(f"with in_order nothing tells which table a {type(target).__name__} follows; {remedy}")
    for course in courses:
        first = course.plan.timesteps[0]
        if len(sharing := [f"{len(other.plan)}" for other in courses if first in other.plan.timesteps]) > 1:
            raise InputError(
                f"runs of a {type(target).__name__} are known by their first timesteps, and {first} is in the tables "
                f"of {' and '.join(sharing)} steps; {remedy}"
            )
    return ByFirstTimestep(courses)


class ByScheduler:
    """The course that has the timesteps which the pipeline's scheduler has been told.

    Where none has them nothing is followed, though single timesteps may be another course's.
    """

    def __init__(self, pipe: Any, courses: Sequence[Course]) -> None:
        self._courses = tuple(courses)
        self._course = self._courses[0]
        self._ask(pipe)

    def _ask(self, pipe: Any) -> None:
        self._pipe: Callable[[], Any] = _nothing if pipe is None else ref(pipe)  # it holds this: no cycle keeps both
        self._seen: Any = None  # the scheduler's timesteps
        self._missed = set[tuple[float, ...]]()  # which no course has

    def __deepcopy__(self, memo: dict[int, Any]) -> "ByScheduler":
        """A pipeline's copy has a scheduler of its own."""
        pipe = self._pipe()
        return ByScheduler(memo.get(id(pipe), pipe), copy.deepcopy(self._courses, memo))

    def __getstate__(self) -> dict[str, Any]:
        """A model that is pickled leaves its pipeline behind, and goes on as it did last."""
        return {"_courses": self._courses, "_course": self._course}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._ask(None)

    def at(self, t: float | None) -> Course:
        scheduler = getattr(self._pipe(), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not None and timesteps is not self._seen:  # told anew: the one time that a device is waited for
            self._seen = timesteps
            announced = tuple(timesteps.tolist())
            found = next((course for course in self._courses if course.plan.timesteps == announced), None)
            if found is None and announced and announced not in self._missed:
                self._missed.add(announced)
                self._say(type(scheduler).__name__, announced)
            self._course = found or self._course._replace(is_followed=False)
        return self._course

    def _say(self, name: str, announced: tuple[float, ...]) -> None:
        sizes = (f"{len(plan)} from {plan.timesteps[0]:g} to {plan.timesteps[-1]:g}" for plan, *_ in self._courses)
        logging.getLogger(__name__).warning(
            "nothing is reused: %s has %d timesteps from %g to %g, and the tables have %s; add one of them, moved "
            "there: table.retime(pipe.scheduler.timesteps.tolist())",
            *(name, len(announced), announced[0], announced[-1], ", ".join(sizes)),
        )


class ByFirstTimestep:
    """The course that a run begins with; no course has the first timestep of another."""

    def __init__(self, courses: Sequence[Course]) -> None:
        self._course = courses[0]
        self._by_first = {course.plan.timesteps[0]: course for course in courses}

    def at(self, t: float | None) -> Course:
        self._course = self._course if t is None else self._by_first.get(t, self._course)
        return self._course


def _nothing() -> None:
    """Stand in for a pipeline that is gone."""
