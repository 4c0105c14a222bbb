"""Measurement of what a path search needs, along uncached trajectories of some samples.

What all layers add to the embedding is one tensor a step. A forecast of it is a sum with factors that add up to one, so
that its error is, to first order, the same sum over the changes that each earlier step's tensor alone would make. Their
products, one small Gram matrix a step, give the error of every forecast of every plan: no plan is run for it.
"""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from ebcache_fast.calibration.guided_run import GuidedRun, Setting
from ebcache_fast.calibration.path_search import Array
from ebcache_fast.engine.trajectory import Prediction
from ebcache_fast.plan import COMPUTE, KeepSpan, ModelShape, Plan, SkipSpan, Slot, StepPlan
from ebcache_fast.plan.program import CHANGE

SMALL = 0.25  # of another step's tensor that is mixed in: little enough to be linear, enough to be seen in float32
PUSH = 0.3  # of a forecast's error that displaces the latents
SMOOTHED = 2  # steps on either side over which growth is averaged


def measuring_plan(shape: ModelShape, timesteps: tuple[float, ...]) -> Plan:
    """The plan of which every step can be computed in full, and each but the first from what is put into its slot."""
    last = len(shape.sites) - 1
    full, skipped = (StepPlan(shape.sites, (COMPUTE,) * (last + 1), (span(0, last),)) for span in (KeepSpan, SkipSpan))
    return Plan((full, *[skipped] * (len(timesteps) - 1)), timesteps)


def change_slot(shape: ModelShape) -> Slot:
    """The slot of what all layers add to the embedding."""
    return Slot(CHANGE, 0, len(shape.sites) - 1)


@torch.no_grad()
def grams(setting: Setting, samples: range, window: int) -> Array:
    """The sums over these samples of `Measurement.gram` (S, W, W), each sample's being a mean over its elements."""
    shape, steps = setting.denoiser.shape, setting.steps
    found = np.zeros((steps, window, window))
    with GuidedRun.of(setting, samples, measuring_plan(shape, setting.sampler.timesteps)) as run:
        slot, (x, memory) = run.slot(change_slot(shape)), run.first
        recent: deque[Tensor] = deque(maxlen=window)  # the last first
        for step in range(steps):
            own = run.predict(step, x, is_full=True)
            change = slot.clone()
            if recent:
                moved = torch.stack([_mixed(run, step, x, slot, change, other, own) for other in recent]).flatten(1)
                count = len(recent)
                products = (moved.double() @ moved.double().T) / x[0].numel()
                found[step, :count, :count] = products.cpu().numpy()
            recent.appendleft(change)
            x, memory = run.update(step, x, own, memory)
            setting.on_step(len(samples))
    return found


def _mixed(
    run: GuidedRun, step: int, x: Tensor, slot: Tensor, change: Tensor, other: Tensor, own: Prediction
) -> Tensor:
    """The derivative of the noise (N, C, H, W) where another step's tensor takes the place of this one's."""
    slot.copy_(torch.lerp(change, other, SMALL))
    return (run.predict(step, x).eps - own.eps) / SMALL


@torch.no_grad()
def growth(setting: Setting, samples: range, probed: tuple[int, ...]) -> Array:
    """Growth, until the final sample, of the displacement that a forecast causes at each probed step, by RMS.

    The forecast is the line through the two steps before. A random displacement would not do: along a trajectory it
    fades, where the errors of forecasts grow at high noise.
    """
    shape, steps = setting.denoiser.shape, setting.steps
    displaced: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}  # after each probed step
    with GuidedRun.of(setting, samples, measuring_plan(shape, setting.sampler.timesteps)) as run:
        slot, (x, memory) = run.slot(change_slot(shape)), run.first
        recent: deque[Tensor] = deque(maxlen=2)
        for step in range(steps):
            own = run.predict(step, x, is_full=True)
            change = slot.clone()
            after, kept = run.update(step, x, own, memory)
            if step in probed:
                slot.copy_(torch.lerp(change, 2 * recent[0] - recent[1], PUSH))
                moved, moved_kept = run.update(step, x, run.predict(step, x), memory)
                displaced[step] = moved, moved - after, moved_kept
            recent.appendleft(change)
            x, memory = after, kept
            setting.on_step(len(samples))
        found = []
        for step, (moved, by, kept) in displaced.items():
            for later in range(step + 1, steps):
                moved, kept = run.update(later, moved, run.predict(later, moved, is_full=True), kept)
                setting.on_step(len(samples))
            size = float(by.square().mean().sqrt())
            found.append(float((moved - x).square().mean().sqrt()) / size if size else 1.0)  # nothing to carry
    return np.array(found)


def smoothed(probed: tuple[int, ...], found: Array, steps: int) -> Array:
    """Growth at every step, (S,): its logarithm interpolated between probes, and averaged over neighbours."""
    logs = np.interp(np.arange(steps), probed, np.log(np.maximum(found, 1e-6)))
    spans = [logs[max(0, k - SMOOTHED) : k + SMOOTHED + 1].mean() for k in range(steps)]
    smooth: Array = np.exp(spans)
    return smooth


def probes(steps: int, most: int) -> tuple[int, ...]:
    """Steps at which growth is measured: from the third to the last, evenly, ``most`` at most; none of fewer steps."""
    count = min(most, steps - 2)
    if count < 1:
        return ()
    return tuple(dict.fromkeys(np.linspace(2, steps - 1, count).round().astype(int).tolist()))
