"""Sampling runs: each has a leased buffer set of its own, and is all that holds state of the run."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebcache_fast.engine.buffer_set import BufferSet, Executable
from ebcache_fast.engine.buffers import Buffers
from ebcache_fast.errors import TrajectoryError


class Prediction(NamedTuple):
    """Outputs that a sampler needs of a step, both (N, C, H, W); ``variance`` is None where a model learned none."""

    eps: Tensor
    variance: Tensor | None


def split(out: Tensor, samples: int, channels: int) -> Prediction:
    """eps and the variance output of the conditional rows of an output (R, Cout, H, W)."""
    cond = out[:samples]
    return Prediction(cond[:, :channels], cond[:, channels:] if cond.shape[1] > channels else None)


class Trajectory:
    """A run of our own loop: it knows its steps, and neither allocates nor waits for anything between them."""

    def __init__(self, buffer_set: BufferSet, executable: Sequence[Executable]) -> None:
        self._buffer_set, self._waiting = buffer_set, list(reversed(executable))
        self._done = 0
        self._why_over: str | None = None

    @property
    def x(self) -> Tensor:
        """The latents (N, C, H, W) as of now, in memory that the next run overwrites."""
        return self._buffer_set.buffers.x

    def advance(self) -> int:
        """Run what is to be run at once, in place; returns how many steps that were, 0 at the end.

        After a step that failed, which may have moved the latents, and after the end there are no more:
        TrajectoryError.
        """
        if self._why_over is not None:
            raise TrajectoryError(f"{self._why_over}; begin a new run")
        if not self._waiting:
            return 0
        executable = self._buffer_set.as_of_now(self._waiting.pop())
        self._why_over = "a step of this run failed, perhaps half way through"  # unless all goes well
        self._buffer_set.streams.join()
        self._buffer_set.run(executable, self._done)
        self._why_over = None
        self._done += len(executable.names)
        return len(executable.names)

    def end(self) -> None:
        """Give the memory back: it is another run's from now on."""
        self._why_over = "this run has ended, and its memory is another's"


class ForwardTrajectory:
    """A run of somebody else's loop, who calls the model once a step."""

    def __init__(self, buffer_set: BufferSet, executable: Sequence[Executable], refill: Executable) -> None:
        self.buffer_set, self._executable, self._refill = buffer_set, executable, refill
        self.scale: float | None = None  # that it guides by, if the host knows
        with torch.inference_mode(mode=False):  # else only that mode could write to it
            self._broken = torch.zeros(1, dtype=torch.bool, device="cpu", pin_memory=buffer_set.buffers.x.is_cuda)

    def predict(self, step: int, x: Tensor, *, is_full: bool = False) -> Tensor:
        """The planned step for latents x (N, C, H, W) -> (R, Cout, H, W) in x's dtype, the caller's to keep.

        ``is_full``: everything is computed and stored, whatever was planned.
        """
        self.buffer_set.streams.join()
        buffers = self.buffer_set.buffers
        buffers.x.copy_(x[: len(buffers.x)])
        self.buffer_set.run(self._refill if is_full else self._executable[step], step)
        out = buffers.out
        return out.clone() if out.dtype == x.dtype else out.to(x.dtype)

    def run_full(self, step: int, x: Tensor) -> Tensor:
        """`predict` with everything computed and stored."""
        return self.predict(step, x, is_full=True)

    @torch.no_grad()
    def run_full_at(self, t: float, x: Tensor) -> Tensor:
        """`run_full` at a timestep that is not in the plan."""
        self._joined().modulation.load_row(len(self._executable), t)
        return self.run_full(len(self._executable), x)

    def guide(self, scale: float | Tensor) -> None:
        """Set the guidance scale from now on."""
        known = None if isinstance(scale, Tensor) else scale
        if known is None or known != self.scale:
            with torch.no_grad():
                number = scale.reshape(()) if isinstance(scale, Tensor) else scale
                self._joined().guide.settings[:1].fill_(number)
        self.scale = known

    def give(self, t: Tensor, y: Tensor) -> None:
        """Timesteps and labels (R,) of the call that comes next, for the device to check; of a guarded run."""
        self._joined().guard.give(t, y)

    def is_broken(self, *, wait: bool) -> bool:
        """True if the device found a call that was not the planned one: by now if ``wait``, else by a while ago."""
        broken = self.buffer_set.buffers.guard.broken
        if wait:
            return bool(broken)
        seen = bool(self._broken)
        self._broken.copy_(broken, non_blocking=True)
        return seen

    def _joined(self) -> Buffers:
        """The memory, for the caller's stream of now: it may call on another one than last time."""
        self.buffer_set.streams.join()
        return self.buffer_set.buffers
