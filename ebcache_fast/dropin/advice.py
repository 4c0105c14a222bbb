"""Advice about steps that could not follow the plan, said with the first of each kind."""

from ebcache_fast.dropin.decision import ALIKE, GAVE_WAY, UNPLANNED
from ebcache_fast.plan import Plan

SHOWN = 4  # timesteps


def advice_on(why: str, t: float, plan: Plan, max_trajectories: int) -> str:
    """The remedy, to be followed by more; "" where there is none but to call the model in the plan's order."""
    if why == UNPLANNED:
        few = ", ".join(f"{planned:g}" for planned in plan.timesteps[:SHOWN])
        more = f", ... ({len(plan)} steps)" if len(plan) > SHOWN else ""
        return (
            f"t={t:g}, and the plan has {few}{more}: move its table with "
            "table.retime(pipe.scheduler.timesteps.tolist()), and ask for as many steps; strict=True raises instead; "
        )
    if why == GAVE_WAY:
        return f"raise max_trajectories={max_trajectories} of enable(), which costs memory for the caches of each; "
    if why == ALIKE:
        return "let each run hold labels or prompts in tensors of its own, made once (labels.clone()); "
    return ""
