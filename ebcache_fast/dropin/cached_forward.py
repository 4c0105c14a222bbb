"""Which step of which run a call is, and what answers it."""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ebcache_fast.dropin.model_call import ModelCall
from ebcache_fast.engine.buffers import Ending, Numerics
from ebcache_fast.engine.engine import Engine, EngineOptions
from ebcache_fast.engine.fingerprint import Fingerprint, fingerprint
from ebcache_fast.engine.stats import Stats
from ebcache_fast.engine.step_scheduler import Arrival, StepScheduler
from ebcache_fast.engine.trajectory import ForwardTrajectory
from ebcache_fast.errors import InputError, TrajectoryError
from ebcache_fast.plan import Plan

OFF_SWITCH = "EBCACHE_DISABLE"


class DeclinedError(Exception):
    """The model's own forward has to answer this call; the message says why."""


@dataclass
class Lane:
    """One run in progress. Runs are told apart by their labels, so that several may be interleaved."""

    trajectory: ForwardTrajectory
    weights: Fingerprint
    expected: int = 0  # the step that comes next
    began_again: bool = False  # its first step was called twice in a row


class CachedForward:
    """Answers a model's calls under a plan; what it can't answer, the model's own forward does, and is counted.

    Timestep and labels say which step of which run a call is. One that does not come next in its run computes
    everything, stores every slot and is counted. With ``strict`` both raise TrajectoryError. Calls are answered one
    at a time, from whatever thread.
    """

    _ending = Ending.PREDICT

    def __init__(self, model: nn.Module, plan: Plan, options: EngineOptions, guided_channels: int) -> None:
        self.model, self.plan, self.options = model, plan, options
        self.guided_channels = guided_channels  # of forward_with_cfg; 0 where the model's own has to run
        self.is_installed = False
        self.replaced: dict[str, Any] = {}  # what the model itself, not its class, had for a forward
        self._start()

    def _start(self) -> None:
        self._scheduler = StepScheduler(self.plan)
        self._engine: Engine | None = None
        self._lanes: OrderedDict[Hashable, Lane] = OrderedDict()  # the one called last at the end
        self._originals, self._refreshed = Counter[str](), Counter[str]()
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes along how it is set up, and nothing that is in progress."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def install(self) -> None:
        """Put it in the place of the model's own forward."""
        own: dict[str, Callable[..., Tensor]] = {"forward": self.forward}
        if self.guided_channels:
            own["forward_with_cfg"] = self.forward_with_cfg
        self.replaced = {name: vars(self.model)[name] for name in own if name in vars(self.model)}
        vars(self.model).update(own)
        self.is_installed = True

    def remove(self) -> None:
        """Give the model its own forward back; whoever wrapped this one gets the model's own through it."""
        self.is_installed = False
        for name in ("forward", "forward_with_cfg"):
            if getattr(vars(self.model).get(name), "__self__", None) is self:
                del vars(self.model)[name]
                vars(self.model).update({name: self.replaced[name]} if name in self.replaced else {})
        self._start()

    @property
    def engine(self) -> Engine:
        """What runs the steps, made when it is first needed."""
        if self._engine is None:
            self._engine = Engine(self.model, self.options)
        return self._engine

    @property
    def stats(self) -> Stats:
        """What was done since it was put in place."""
        return replace(self.engine.stats, originals=dict(self._originals), refreshed=dict(self._refreshed))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As the model's: latents x (R, C, H, W), timesteps t (R,), labels y (R,) -> (R, out_channels, H, W)."""
        return self._answer(ModelCall(x, t, y), "forward", x, t, y)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """As the model's: the second half of the batch is unconditional, and takes the latents of the first."""
        call = ModelCall(x, t, y, cfg_scale, self.guided_channels)
        return self._answer(call, "forward_with_cfg", x, t, y, cfg_scale)

    def original(self, name: str, *args: Any) -> Tensor:
        """What the model itself answers."""
        own: Callable[..., Tensor] = self.replaced.get(name) or getattr(type(self.model), name).__get__(self.model)
        return own(*args)

    def _answer(self, call: ModelCall, name: str, *args: Any) -> Tensor:
        with self._lock:
            try:
                self._decline_what_must_be(call)
                with torch.no_grad():
                    return self._cached(call)
            except DeclinedError as declined:
                why = str(declined)
            if self.options.strict and why != OFF_SWITCH:
                raise TrajectoryError(f"the plan can't be followed here: {why}; strict=False runs the model uncached")
            self._originals[why] += 1
        return self.original(name, *args)

    def _decline_what_must_be(self, call: ModelCall) -> None:
        if not self.is_installed or os.environ.get(OFF_SWITCH, "0") not in ("", "0"):
            raise DeclinedError(OFF_SWITCH)
        if self.model.training:
            raise DeclinedError("the model is in training mode")
        if torch.is_autocast_enabled(call.x.device.type):
            raise DeclinedError("autocast is on")
        if torch.is_grad_enabled() and any(one.requires_grad for one in (call.x, *self.model.parameters())):
            raise DeclinedError("gradients are recorded")

    def _cached(self, call: ModelCall) -> Tensor:
        weights = fingerprint(self.model)  # while the device may be busy with the last call still
        if weights.watched and (module := self.engine.denoiser.passed_over_hooks()):
            raise DeclinedError(f"{module} has hooks, and no part of the engine calls it")
        call.check(self.engine.denoiser)
        return self._step(call, weights)

    def _step(self, call: ModelCall, weights: Fingerprint) -> Tensor:
        facts = call.read(self.engine.denoiser)
        if len(facts.timesteps) != 1:
            raise DeclinedError("timesteps differ within the batch")
        (t,) = facts.timesteps
        key = facts.labels, call.guided_channels, Numerics.now(call.x.device)
        lane = self._lanes.get(key)
        arrival = self._scheduler.arrive(t, lane.expected if lane else 0)
        if lane is None:
            why = "a run did not begin with the first step"
        elif not arrival.begins and lane.weights != weights:
            arrival, why = arrival._replace(begins=True, planned=False), "weights changed within a run"
        elif arrival.begins:
            why = "a timestep came again"
            self._refuse_twins(lane, arrival, t)
        else:
            why = "steps were left out" if arrival.step is not None else "a timestep is not in the plan"
        if not arrival.planned:
            if self.options.strict:
                raise TrajectoryError(f"t={t:g} was not expected: {why}; strict=False computes such a step in full")
            self._refreshed[why] += 1
        if lane is None or arrival.begins:
            lane = self._begin(key, call, weights)
        self._lanes.move_to_end(key)
        return self._run(key, lane, arrival, t, call)

    def _refuse_twins(self, lane: Lane, arrival: Arrival, t: float) -> None:
        """Two runs of the same labels that take turns: their second step shows, in time, that they are not one."""
        if lane.began_again and arrival.step and arrival.step == lane.expected - 1:
            raise TrajectoryError(
                f"t={t:g} came twice with the same labels, and so did the first step: two runs that take turns can "
                "only be told apart by their labels; finish one before the other begins"
            )

    def _begin(self, key: Hashable, call: ModelCall, weights: Fingerprint) -> Lane:
        before = self._lanes.get(key)
        if before is not None:
            self._end(key)
        elif len(self._lanes) >= self.options.max_trajectories:
            self._end(next(iter(self._lanes)))
        try:
            trajectory = self.engine.forward_run(self.plan, call.batch, self._ending)
        except InputError as error:  # too little memory: all else was checked
            if self.options.strict:
                raise
            raise DeclinedError(f"too little memory: {error}") from error
        lane = Lane(trajectory, weights, began_again=before is not None and before.expected == 1)
        self._lanes[key] = lane
        return lane

    def _end(self, key: Hashable) -> None:
        self.engine.release(self._lanes.pop(key).trajectory.place)

    def _run(self, key: Hashable, lane: Lane, arrival: Arrival, t: float, call: ModelCall) -> Tensor:
        trajectory, step = lane.trajectory, arrival.step
        if call.guided_channels:
            trajectory.guide(call.cfg_scale)
        if step is None:
            return trajectory.refresh_at(t, call.x)
        out = (trajectory.predict if arrival.planned else trajectory.refresh)(step, call.x)
        lane.expected = step + 1
        if lane.expected == len(self.plan):
            self._end(key)
        return out
