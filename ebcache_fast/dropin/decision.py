"""The decision whose run a call belongs to and what answers it, over plain numbers: neither tensors nor the model."""

from collections.abc import Collection, Mapping
from enum import Enum
from typing import NamedTuple

FRESH = "a run did not begin with the first step"
AGAIN = "a timestep came again"
LEFT_OUT = "steps were left out"
UNPLANNED = "a timestep is not in the plan"
ALIKE = "runs of the same tensors can't be told apart"
GAVE_WAY = "more runs took turns than max_trajectories"


class Whose(Enum):
    """Owner of a call among the runs in progress."""

    BEGINS = "a new run's"
    NEXT = "that of the run which expects this step"
    ENDS = "that of the only run, whose timesteps rise, as in an inversion, so that the first step is its last"
    ONLY = "that of the only run that it could be of, which expects another step"
    ALIKE = "any one's: nothing tells which"


class Answer(Enum):
    """Answer to a call."""

    FOLLOW = "the planned step"
    REFRESH = "a step that computes everything and stores every slot"
    DECLINE = "the model's own forward"
    REFUSE = "TrajectoryError"


class Stand(NamedTuple):
    """Knowledge of a run with caches, besides the step that it expects."""

    is_doubtful: bool = False  # its tensors are gone, and never came anew so far
    rises: bool = False  # its steps come in rising order of timesteps
    changed: str | None = None  # why its caches are of no use now


class Standing(NamedTuple):
    """Positions of the unfinished runs that came with the same tensors."""

    at: Mapping[int, Stand] = {}  # those with caches, by the step that each expects
    lost: Mapping[int, int] = {}  # how many without caches expect a step; too many rather than too few
    ends: Collection[int] = ()  # one past the last steps of runs that may make those again
    gave_way: bool = False  # a run lost its caches to others, beyond max_trajectories


class Verdict(NamedTuple):
    """Verdict on a call: whose it is, and what answers it."""

    whose: Whose
    run: int | None = None  # to run in: the one that expects this step; None where it needs a new one
    is_outdated: bool = False  # that one's caches are of no use, and a new run takes its place
    answer: Answer = Answer.FOLLOW
    why: str | None = None  # the plan is not followed

    @property
    def is_only(self) -> bool:
        """True if there is no other run that it could be of."""
        return self.whose in (Whose.ONLY, Whose.ENDS)


NOBODY = Standing()


def decide(
    step: int | None,
    runs: Standing,
    forgotten: Standing = NOBODY,
    *,
    is_full: bool = False,
    strict: bool = False,
    in_order: bool = False,
) -> Verdict:
    """Decide whose a call of a planned step is, None being a timestep that is not in the plan, and what answers it.

    A step is the next one of the run that expects it, unless another run expects it too, or has just made it and may
    make it again, as samplers do that visit a timestep twice. Then it could be either's, and only a step of which the
    plan computes everything (``is_full``) can follow the plan.

    runs: those of the call's tensors. forgotten: others, without caches, that may be of such tensors.
    strict: what departs from the plan is refused. in_order: it is the model's own forward's, but of a run that may go
    on with tensors made anew.
    """
    at, later = runs.at, None if step is None else step + 1
    known = len(at) + sum(runs.lost.values()) + sum(forgotten.lost.values())
    known += later in runs.ends or later in forgotten.ends
    only = next(iter(at), None) if known == 1 else None
    why = None
    if step == 0:
        is_end = only is not None and at[only].rises
        whose, run = (Whose.ENDS, only) if is_end else (Whose.BEGINS, 0 if 0 in at else None)
    elif (
        step is not None
        and step in at
        and later not in at
        and not at[step].is_doubtful
        and not any(
            group.lost.get(step) or group.lost.get(step + 1) or later in group.ends for group in (runs, forgotten)
        )
    ):
        whose, run = Whose.NEXT, step
    elif known > 1:
        whose, run = Whose.ALIKE, next((expected for expected in (step, later, *at) if expected in at), None)
        why = UNPLANNED if step is None else None if is_full else ALIKE
    else:
        whose, run = Whose.ONLY, only
        if step is None:
            why = UNPLANNED
        elif only is None:
            why = GAVE_WAY if runs.gave_way else FRESH
        elif only == 0 or at[only].is_doubtful:
            why = FRESH
        else:
            why = AGAIN if step < only else LEFT_OUT
    stand = Stand() if run is None else at[run]
    if stand.changed is not None and step != 0 and whose is not Whose.ALIKE:
        why = stand.changed
    if why is None:
        answer = Answer.FOLLOW
    elif in_order and not (whose is Whose.ONLY and stand.is_doubtful):
        answer = Answer.DECLINE
    else:
        answer = Answer.REFUSE if strict else Answer.REFRESH
    return Verdict(whose, run, stand.changed is not None, answer, why)
