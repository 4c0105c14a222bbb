"""Plans of computed steps at will, with forecasts between them: of every branch, or of all layers at once."""

from collections.abc import Iterable
from typing import Literal

from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, Compute, Forecast, ForecastSpan, KeepSpan, ModelShape, Plan, Rule, StepPlan
from ebcache_fast.plan.rules import MAX_ORDER

Of = Literal["stack", "branches"]


def forecast(
    timesteps: tuple[float, ...],
    shape: ModelShape,
    computed: Iterable[int],
    order: int = 1,
    law: str = "newton",
    of: Of = "stack",
    eps_scale: float = 1.0,
) -> Plan:
    """Plan full steps at the ``computed`` indices, in execution order, and forecasts of ``order`` or less between them.

    A forecast takes as many of the last computed steps as there are, ``order`` + 1 at most. law: one of
    `ebcache_fast.plan.factors.LAWS`. of: "stack" keeps what all layers add to the embedding, ``order`` + 1 tensors in
    all; "branches" keeps so many of each branch's outputs, with the gates of the step at hand.

    Source of forecasts: TaylorSeer, Liu et al., arXiv 2503.06923. Raises TableError for a first step that is not
    computed, an index outside the run, an order, a law or an ``of`` that there is not.
    """
    full, steps = sorted(set(computed)), len(timesteps)
    if not full or full[0] != 0 or full[-1] >= steps:
        raise TableError(
            f"computed: expected indices from 0 to {steps - 1}, 0 among them, got {full}; a forecast needs a step "
            "computed before it"
        )
    if of not in ("stack", "branches"):
        raise TableError(f"of: expected stack or branches, got {of!r}")
    if type(order) is not int or not 0 <= order <= MAX_ORDER:
        raise TableError(f"order: expected 0 to {MAX_ORDER}, got {order!r}")
    make = _of_stack if of == "stack" else _of_branches
    plans = {(is_full, n): make(shape, n, law, is_full=is_full) for is_full in (True, False) for n in range(order + 1)}
    found, count = [], 0  # count: of steps computed so far
    for step in range(steps):
        is_full = step in full
        found.append(plans[is_full, count % (order + 1) if is_full else min(count - 1, order)])
        count += is_full
    return Plan(tuple(found), timesteps, eps_scale)


def _of_stack(shape: ModelShape, number: int, law: str, *, is_full: bool) -> StepPlan:
    """A computed step that keeps the change of all layers as of age ``number``, or a forecast of that order."""
    last = len(shape.sites) - 1
    span = KeepSpan(0, last, number) if is_full else ForecastSpan(0, last, number, law)
    return StepPlan(shape.sites, (COMPUTE,) * len(shape.sites), (span,))


def _of_branches(shape: ModelShape, number: int, law: str, *, is_full: bool) -> StepPlan:
    rule: Rule = Compute(number) if is_full else Forecast(number, law)
    return StepPlan(shape.sites, (rule,) * len(shape.sites))
