"""Fits and trials of a path's plans: corrections along the cached trajectory, and the error that is left."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ebcache_fast.calibration.guided_run import GuidedRun, Setting
from ebcache_fast.plan import Correction, Plan

RIDGE = 1e-3  # of each factor's own square
LEAST = 0.01  # factor of the noise
TWICE, WITH_X = Correction(2.0, 0.0), Correction(1.0, 1.0)


@torch.no_grad()
def uncached(setting: Setting, samples: range) -> list[Tensor]:
    """The latents (N, C, H, W) before each step of the uncached run, and after the last."""
    shape, timesteps = setting.denoiser.shape, setting.sampler.timesteps
    return trajectory(setting, samples, Plan.uncached(timesteps, shape.sites))


@torch.no_grad()
def trajectory(setting: Setting, samples: range, plan: Plan) -> list[Tensor]:
    """The latents (N, C, H, W) before each step of a run under a plan, its corrections included, and after the last."""
    with GuidedRun.of(setting, samples, plan) as run:
        x, memory = run.first
        found = [x]
        for step in range(setting.steps):
            x, memory = run.update(step, x, run.predict(step, x), memory)
            found.append(x)
            setting.on_step(len(samples))
    return found


@torch.no_grad()
def fitted(setting: Setting, parts: Sequence[range], plan: Plan, references: Sequence[list[Tensor]]) -> Plan:
    """The plan with the corrections that lead the cached trajectory back to the uncached one, step by step.

    references: of the samples of each part; all parts go on together. Each step's two factors are least squares over
    all samples and elements of the latents after it, given what the steps before were corrected to.
    """
    corrections: list[Correction] = []
    bare = replace(plan, corrections=())
    with ExitStack() as stack:
        runs = [stack.enter_context(GuidedRun.of(setting, part, bare)) for part in parts]
        states = [run.first for run in runs]
        for step in range(setting.steps):
            found = [run.predict(step, x) for run, (x, _) in zip(runs, states, strict=True)]
            sums = torch.zeros(3, 3, dtype=torch.float64)
            for run, (x, memory), prediction, reference in zip(runs, states, found, references, strict=True):
                plain, more_eps, more_x = (
                    run.update(step, x, prediction, memory, correction)[0]
                    for correction in (Correction(), TWICE, WITH_X)
                )
                columns = torch.stack([more_eps - plain, more_x - plain, reference[step + 1] - plain]).flatten(1)
                sums += (columns.double() @ columns.double().T).cpu()
            corrections.append(_least_squares(sums))
            states = [
                run.update(step, x, prediction, memory, corrections[-1])
                for run, (x, memory), prediction in zip(runs, states, found, strict=True)
            ]
            setting.on_step(sum(map(len, parts)))
    return replace(plan, corrections=tuple(corrections))


def _least_squares(sums: Tensor) -> Correction:
    """The correction that makes up best for what is missing.

    sums: the products (3, 3) of what one more of eps does, one more of x, and what is missing.
    """
    normal, squares = sums[:2, :2], torch.diag(sums)[:2]
    if not squares.all():  # the sampler takes no correction there
        return Correction()
    more, on_x = torch.linalg.solve(normal + RIDGE * torch.diag(squares), sums[:2, 2]).tolist()
    return Correction(max(1.0 + more, LEAST), on_x)


def paired_errors(images: Tensor, reference: Tensor) -> list[float]:
    """RMS difference of each final sample (N, ...) from its reference, over that one's RMS: paths are chosen by it."""
    of_difference, size = (t.flatten(1).double().square().mean(dim=1).sqrt() for t in (images - reference, reference))
    errors: list[float] = (of_difference / size.clamp_min(torch.finfo(torch.float32).tiny)).tolist()
    return errors
