"""Cached forward of a model: finds the run and the step that a call is, and answers it."""

from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ebcache_fast.dropin.courses import Choice, Course
from ebcache_fast.dropin.decision import Answer, Whose, decide
from ebcache_fast.dropin.departures import Departures
from ebcache_fast.dropin.diffusers_signatures import signature_of
from ebcache_fast.dropin.eligibility import OFF_SWITCH, Admitted, DeclinedError, Eligibility, UnfitError
from ebcache_fast.dropin.other_caches import what_hides
from ebcache_fast.dropin.patching import FORWARD, Method, MethodPatch, is_sent_away
from ebcache_fast.dropin.prompt_ids import PromptIds
from ebcache_fast.dropin.run_state import RunState
from ebcache_fast.dropin.runs import Key, Runs, Turn
from ebcache_fast.dropin.signatures import ForwardCall
from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.module_watch import ModuleState
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.stats import Counts, Stats
from ebcache_fast.engine.step_scheduler import StepScheduler
from ebcache_fast.engine.trajectory import ForwardTrajectory
from ebcache_fast.errors import CacheLimitError, InputError, TableError, TrajectoryError
from ebcache_fast.models.layers import parameters_of
from ebcache_fast.plan import Plan

PIPELINE_ENDS = "_reset_stateful_cache"  # what pipelines of diffusers call on their components when they are done
ATTRIBUTE = "_cached_forward"  # by which a model knows what is in the place of its forward


class CachedForward:
    """Answers a model's calls under a plan; what it can't answer, the model's own forward does, and is counted.

    The timestep says which step a call is, its labels or prompts of which run. One that does not come next in its run,
    or that could be of two, computes everything, stores every slot and is counted. With ``strict`` all of these raise
    TrajectoryError. Calls are answered one at a time, from whatever thread.

    Raises InputError where the model computes something else than its parts say, TableError where the plan is for
    another one.
    """

    _tail, _in_order = Tail(), False

    def __init__(self, model: nn.Module, course: Course, options: EngineOptions, choice: Choice | None = None) -> None:
        self.model, self.options, self.course, self.choice = model, options, course, choice
        self.patch = MethodPatch(model)
        self.eligibility = Eligibility(model, self.plan, options, self.patch)
        self.signature = signature_of(model)(self)
        self._lock = RLock()
        self._forget_runs()

    def forget(self) -> None:
        """Drop all that is in progress, and the memory for it, once a call of another thread has its answer."""
        with self._lock:
            self.eligibility.forget()
            self._forget_runs()

    @property
    def plan(self) -> Plan:
        """The plan that calls follow by now."""
        return self.course.plan

    def _forget_runs(self) -> None:
        self._scheduler = StepScheduler(self.plan)
        self._engine: Engine | None = None
        self._begin_to_know()
        self._departures = Departures()

    def _begin_to_know(self) -> None:
        decided = partial(decide, strict=self.options.strict, in_order=self._in_order)
        self._runs = Runs(self.options.max_trajectories, self._release, decided)
        self._prompts = PromptIds(self.options.max_trajectories)

    def __getstate__(self) -> dict[str, Any]:
        """Return how it is set up, for a copy, and nothing that is in progress."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = RLock()
        self._forget_runs()

    def install(self) -> None:
        """Put this forward in the place of the model's own."""
        self.patch.replace(self._methods)
        vars(self.model)[ATTRIBUTE] = self

    def remove(self) -> None:
        """Give the model its own forward back; whoever wrapped this one gets the model's own through it."""
        self.patch.restore(self._methods)
        del vars(self.model)[ATTRIBUTE]

    @property
    def _methods(self) -> dict[str, Method]:
        return {**self.signature.methods, "_apply": self._moved, PIPELINE_ENDS: self._pipeline_ends}

    def _moved(self, *args: Any, **named: Any) -> Any:
        """``nn.Module._apply``, by which modules move: sent to another device, it leaves no memory where it was."""
        before = _device_of(self.model)
        out = self.patch.method("_apply")(*args, **named)
        if _device_of(self.model) != before:
            self._let_go()
        return out

    def _pipeline_ends(self, *args: Any, **named: Any) -> Any:
        """Answer the call by which diffusers ends its own caches; `_let_go` where memory is not kept between runs."""
        if self._keeps_nothing:
            self._let_go()
        return self.patch.method(PIPELINE_ENDS)(*args, **named) if hasattr(type(self.model), PIPELINE_ENDS) else None

    @property
    def _keeps_nothing(self) -> bool:
        return self.options.release or is_sent_away(self.model)

    def _let_go(self) -> None:
        """Free the memory of runs, those in progress too; what was counted stays."""
        with self._lock:
            self._runs.drop_all()
            self._begin_to_know()
            if self._engine is not None:
                self._engine.let_go()

    @property
    def guided_channels(self) -> int:
        """Number of channels that ``forward_with_cfg`` guides; 0 where the model's own has to run."""
        return self.eligibility.guided_channels

    @property
    def engine(self) -> Engine:
        """The engine that runs the steps, made when it is first needed."""
        if self._engine is None:
            self._engine = Engine(self.model, self.options)
        return self._engine

    @property
    def stats(self) -> Stats:
        """Counts of all that was done since this forward was put in place."""
        with self._lock:
            done = self._engine.stats if self._engine is not None else Counts().snapshot(0, 0, {})
            hidden_by = what_hides(self.model, self.signature.methods[FORWARD])
            originals, refreshed = dict(self._departures.originals), dict(self._departures.refreshed)
            return replace(done, originals=originals, refreshed=refreshed, hidden_by=hidden_by)

    def answer(self, call: ForwardCall | None, name: str, *args: Any, **named: Any) -> Any:
        """Return what a method called with these arguments returns: ours, or what the model's own of that name does.

        ``call`` is None where the arguments mean something that the engine does not know.
        """
        if self.patch.is_asked:
            return self.patch.answer(name, *args, **named)
        with self._lock:
            try:
                return self._step(self.eligibility.admit(call))
            except DeclinedError as declined:
                why, unfit = str(declined), declined.__cause__ if isinstance(declined, UnfitError) else None
            if self.options.strict and why != OFF_SWITCH:
                raise TrajectoryError(f"the plan can't be followed here: {why}; strict=False runs the model uncached")
        try:
            out = self.patch.answer(name, *args, **named)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if unfit is None:
                raise
            raise unfit from error
        with self._lock:
            self._departures.answered_by_the_original(why)
        return out

    def _step(self, admitted: Admitted) -> Tensor:
        call, held, denoiser, weights, flags = admitted
        facts = call.read(denoiser)
        if len(facts.timesteps) != 1:
            raise DeclinedError("timesteps differ within the batch")
        (t,) = facts.timesteps
        if self.choice is not None:
            self._take(self.choice.at(t))
        course = self.course
        step = self._scheduler.step_at(t) if course.is_followed else None
        is_full = step is not None and course.plan.refreshing[step]
        key = (facts.labels, *self._kind_of(call))
        turn = self._runs.find(key, held, step, weights, flags, is_full=is_full)
        if turn.verdict.why is not None:
            self._depart(turn, turn.verdict.why, t)
        if turn.verdict.whose is Whose.ALIKE:
            self._runs.disown(turn)
        run = turn.run
        if run is None or turn.verdict.is_outdated:
            run = self._begin(call, weights, instead_of=run)
        try:
            out = self._run(run, turn, t, call)
        except BaseException:
            if turn.verdict.why is not None or run.group is None:  # what its caches hold now, nobody knows
                self._runs.drop(run, lose=True)
            raise
        self._runs.move(turn, run, len(course.plan.steps))
        return out

    def _take(self, course: Course) -> None:
        """Go by this plan from now on."""
        if course is not self.course:
            self.course, self._scheduler = course, StepScheduler(course.plan)

    def _depart(self, turn: Turn, why: str, t: float) -> None:
        """Say that a step computes everything; TrajectoryError or DeclinedError where it is not to be answered so."""
        if turn.verdict.answer is Answer.DECLINE:
            self._runs.pass_by(turn, len(self.plan))
            raise DeclinedError(why)
        near = self._scheduler.near_miss(t)
        if turn.verdict.answer is Answer.REFUSE:
            raise TrajectoryError(f"t={t:g} was not expected: {why}{near}; strict=False computes such a step in full")
        self._departures.computed_in_full(why, t, near, self.plan, self.options.max_trajectories)

    def _kind_of(self, call: ForwardCall) -> Key:
        """Key that sets the runs apart that a call could be of, besides labels."""
        prompt = self._prompts.id_of(call.context, self._runs.prompts) if call.context else 0
        return id(self.course.plan), call.guided_channels, call.x.shape, prompt

    def _begin(self, call: ForwardCall, weights: ModuleState, instead_of: RunState | None) -> RunState:
        """Begin a run with caches of its own."""
        call.check_text()
        if instead_of is not None:
            self._runs.drop(instead_of, lose=True)
        self._runs.make_room()
        run = RunState(self._trajectory_for(call), weights)
        self._runs.add(run)
        return run

    def _trajectory_for(self, call: ForwardCall) -> ForwardTrajectory:
        try:
            return self.engine.forward_run(self.plan, call.batch.with_own_context(), self._tail)
        except TableError as error:  # of a rule that such a batch can't take, as a share without guidance
            if self.options.strict:
                raise
            raise DeclinedError(str(error)) from error
        except InputError as error:  # too little memory: all else was checked
            is_limit = isinstance(error, CacheLimitError)
            if is_limit and self._runs.give_way():
                return self._trajectory_for(call)
            if self.options.strict:
                raise
            raise DeclinedError(str(error) if is_limit else "too little memory for the caches") from error

    def _release(self, run: RunState) -> None:
        first = next((i for i, reads in enumerate(self.plan.reading) if reads), len(self.plan))
        if not run.hits and run.calls > first:
            self._departures.reused_nothing(run.calls)
        self.engine.release(run.trajectory.buffer_set)
        if self._keeps_nothing:
            self.engine.let_go()

    def _run(self, run: RunState, turn: Turn, t: float, call: ForwardCall) -> Tensor:
        trajectory, step, follows = run.trajectory, turn.step, turn.verdict.why is None
        plan, change, _ = self.course
        if call.guided_channels and call.cfg_scale is not trajectory.scale:
            trajectory.guide(call.cfg_scale)
        if run.weights.watched and run.expected > 0:  # hooks may say other things at this step than when the run began
            trajectory.buffer_set.recompute(len(plan.steps) if step is None else step, t)
        run.calls += 1
        if step is None:
            out = trajectory.run_full_at(t, call.x)
        else:
            run.hits += follows and plan.reading[step]
            out = trajectory.predict(step, call.x, is_full=not follows)
        if change is not None:
            change.apply(out, call.x, t, is_planned=follows)
        return out


def _device_of(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in parameters_of(model)), None)
