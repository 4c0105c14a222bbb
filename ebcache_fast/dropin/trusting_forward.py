"""The same for callers who promise the order of their calls: no call waits for the device."""

from torch import Tensor

from ebcache_fast.dropin.answerable import Answerable, DeclinedError
from ebcache_fast.dropin.cached_forward import CachedForward
from ebcache_fast.engine.buffers import Ending
from ebcache_fast.errors import TrajectoryError


class TrustingForward(CachedForward):
    """Answers calls in the order of the plan, one a step, and reads timesteps and labels at the first step alone.

    The device compares them. Where they are not the step's, the output is NaN, and TrajectoryError follows when the
    host sees it: at one of the next calls, or at the run's last. The call after that begins a run again. What x holds
    is not looked at.
    """

    _ending = Ending.PREDICT_GUARDED

    def _step(self, answerable: Answerable) -> Tensor:
        self._choose(None)
        call, denoiser, weights, numerics = answerable
        key = self._kind_of(call)
        if (lane := self._lanes.get(key)) is None:
            if call.read(denoiser).timesteps != {self.plan.timesteps[0]}:
                raise DeclinedError("a run did not begin with the first step")
            lane = self._begin(key, call, weights)
        self._lanes.move_to_end(key)
        trajectory, is_last = lane.trajectory, lane.expected == len(self.plan) - 1
        if lane.weights != weights:
            self._end(key)
            raise TrajectoryError("weights changed within a run; begin it again")
        if lane.numerics != numerics:
            self._end(key)
            raise TrajectoryError("torch's settings or functions changed within a run; begin it again")
        if call.context and lane.is_taken_over(self._makes_of(key), call.given) and lane.expected > 1:
            self._end(key)
            raise TrajectoryError("a run of other prompt tensors goes on in the middle; begin it with the first step")
        trajectory.give(call.t, call.y)
        if call.guided_channels:
            trajectory.guide(call.cfg_scale)
        self._renew(lane, self.plan.timesteps[lane.expected], lane.expected)
        try:
            out = trajectory.predict(lane.expected, call.x)
        except BaseException:
            self._end(key)  # whoever goes on after it begins a run again
            raise
        self._scaled(out, call, self.plan.timesteps[lane.expected])
        lane.expected += 1
        is_broken = trajectory.is_broken(wait=is_last)
        if is_last or is_broken:
            self._end(key)
        if is_broken:
            raise TrajectoryError(
                "a call was not the next step of its run: other timesteps or labels; call the model once a step in the "
                f"order of the plan, {self.plan.timesteps[0]} first, or enable it without trust_order"
            )
        return out
