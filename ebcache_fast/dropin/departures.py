"""Departures of calls from their plan: counted by reason, the first of each said with the remedy."""

import logging
from collections import Counter

from ebcache_fast.dropin.decision import ALIKE, GAVE_WAY, UNPLANNED
from ebcache_fast.dropin.eligibility import OFF_SWITCH
from ebcache_fast.plan import Plan

SHOWN = 4  # timesteps


class Departures:
    """Ledger of one model's calls that got something else than their plan says."""

    def __init__(self) -> None:
        self.originals = Counter[str]()  # calls that the model's own forward answered
        self.refreshed = Counter[str]()  # steps that computed all though their plan reuses
        self._is_idleness_reported = False

    def answered_by_the_original(self, why: str) -> None:
        """Count a call that the model's own forward answered."""
        _count(self.originals, why, "the model's own forward answers, uncached")

    def computed_in_full(self, why: str, t: float, near: str, plan: Plan, max_trajectories: int) -> None:
        """Count a step at timestep ``t`` that computed everything; ``near`` is what it came near to, or ""."""
        _count(self.refreshed, why, f"a step computes everything{near}", _advice_on(why, t, plan, max_trajectories))

    def reused_nothing(self, calls: int) -> None:
        """Say once that a whole run of so many calls reused nothing."""
        if not self._is_idleness_reported:
            self._is_idleness_reported = True
            logging.getLogger(__name__).warning(
                "nothing was reused in a whole run of %d calls; ebcache_fast.dry_check(pipe, table, steps) says which "
                "steps will hit, ebcache_fast.stats(model).summary() what was done instead",
                calls,
            )


def _count(counter: Counter[str], why: str, what: str, advice: str = "") -> None:
    counter[why] += 1
    if counter[why] == 1 and why != OFF_SWITCH:
        logging.getLogger(__name__).warning("%s: %s; %sebcache_fast.stats counts how often", what, why, advice)


def _advice_on(why: str, t: float, plan: Plan, max_trajectories: int) -> str:
    """Return the remedy, to be followed by more; "" where there is none but to call the model in the plan's order."""
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
