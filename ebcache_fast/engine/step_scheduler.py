"""Choice of the step that runs now: by its place in our own loop, by its timestep in anybody else's."""

from collections.abc import Callable
from typing import NamedTuple

from ebcache_fast.plan import LONGEST_RUN, Plan, StepPlan

NEAR, HALF = 0.5, 2.0**-8  # of timesteps; what bfloat16 rounds off, at most


class Dispatch(NamedTuple):
    """Steps that are run at once; of one kind, wherever it begins, there is one graph."""

    plan: StepPlan
    steps: int  # more than one only of steps of which nothing but a sum is left


class StepScheduler:
    """Looks steps up in one plan. It holds no state: where a run is, the run knows."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._step_at: dict[float, int] = {t: i for i, t in enumerate(plan.timesteps)}
        # The place of a timestep in the plan; None where it is not in it.
        self.step_at: Callable[[float], int | None] = self._step_at.get

    def near_miss(self, t: float) -> str:
        """Advice where ``t`` is none of the plan's and all but one of them, as half precision makes it; else "".

        Timesteps are compared to the last bit: at another one the model computes another thing.
        """
        nearest = min(self._step_at, key=lambda planned: abs(planned - t))
        is_near = 0 < abs(nearest - t) <= max(NEAR, nearest * HALF)
        return f", {t!r} where {nearest!r} is; give the model the plan's, to the last bit" if is_near else ""

    def dispatches(self) -> tuple[Dispatch, ...]:
        """The whole plan for our own loop: steps of which nothing but a sum is left, in runs of up to `LONGEST_RUN`."""
        found: list[Dispatch] = []
        for plan in self.plan.steps:
            if plan in self.plan.collapsing and found and found[-1].plan == plan and found[-1].steps < LONGEST_RUN:
                found[-1] = Dispatch(plan, found[-1].steps + 1)
            else:
                found.append(Dispatch(plan, 1))
        return tuple(found)
