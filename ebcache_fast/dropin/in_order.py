"""Cached forward for callers who promise the order of their calls: no call waits for the device."""

from torch import Tensor

from ebcache_fast.dropin.cached_forward import CachedForward
from ebcache_fast.dropin.eligibility import Admitted
from ebcache_fast.dropin.run_state import RunState
from ebcache_fast.dropin.runs import Turn, stand_of
from ebcache_fast.dropin.signatures import ForwardCall
from ebcache_fast.engine.buffers import Tail
from ebcache_fast.errors import TrajectoryError


class InOrderForward(CachedForward):
    """Answers calls with the tensors of a run in the order of the plan, one a step, without a look at what they hold.

    The device compares timesteps and labels. Where they are not the step's, the output is NaN, and TrajectoryError
    follows when the host sees it: at one of the next calls, or at the run's last. The call after that begins a run
    again, and calls with those tensors are read from then on. What x holds is not looked at.

    Calls with tensors that no run is known by are read, as those of a first step. Where they can't follow the plan, the
    model's own forward answers.
    """

    _tail, _in_order = Tail(guarded=True), True

    def _step(self, admitted: Admitted) -> Tensor:
        if self.choice is not None:
            self._take(self.choice.at(None))
        call, held, _, weights, flags = admitted
        turn = self._runs.next_in_order(self._kind_of(call), held)
        if turn is None or turn.run is None:
            return super()._step(admitted)
        if (changed := stand_of(turn.run, weights, flags).changed) is not None:
            self._runs.drop(turn.run)
            raise TrajectoryError(f"{changed}; begin it again")
        return self._next(turn, turn.run, call)

    def _next(self, turn: Turn, run: RunState, call: ForwardCall) -> Tensor:
        timesteps = self.course.plan.timesteps
        is_last = run.expected == len(timesteps) - 1
        try:
            out = self._run(run, turn, timesteps[run.expected], call)
        except BaseException:
            self._runs.drop(run)  # whoever goes on after it begins a run again
            raise
        if not run.trajectory.is_broken(wait=is_last):
            self._runs.move(turn, run, len(timesteps))
            return out
        self._runs.drop(run, lose=True)  # if it is another's that came in between, it may go on
        raise TrajectoryError(
            "a call was not the next step of its run: other timesteps or labels; call the model once a step in the "
            f"order of the plan, {timesteps[0]:g} first, and let each run have tensors of its own, or enable "
            "it without in_order"
        )

    def _run(self, run: RunState, turn: Turn, t: float, call: ForwardCall) -> Tensor:
        run.trajectory.give(call.t, call.y)
        return super()._run(run, turn, t, call)
