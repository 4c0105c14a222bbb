"""The loop that rivals are run by: guidance, eps scaling and a sampler in a few tensor operations, nothing awaited."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.marks import Mark, mark
from bench.rivals.case import Case

Predict = Callable[[Tensor, int], Tensor]  # rows' latents (2N, C, H, W) and the step -> raw output (2N, Cout, H, W)

Call = Callable[[Tensor, Tensor], Tensor]  # the same of rows' latents and timesteps (2N,)


class Run(NamedTuple):
    """One trajectory: its latents (N, C, H, W), and when each dispatch began, and the last one ended."""

    latents: Tensor
    marks: list[Mark]
    host_seconds: float  # of the loop, where nobody waits for the device
    steps: tuple[int, ...] = ()  # of each dispatch; () for one each
    began: Mark | None = None  # where it had to be prepared before the first dispatch, which counts as well


def step_on(case: Case, x: Tensor, out: Tensor, row: Tensor, noise: Tensor | None) -> Tensor:
    """x (N, C, H, W) one step on, by a raw output (2N, Cout, H, W), coefficients (6,) and noise like x, if any."""
    channels, guided, (cx, ce, min_log, max_log, noise_on, sigma) = x.shape[1], case.guided_channels, row
    cond, uncond = out.to(x.dtype).chunk(2)
    eps = torch.cat([torch.lerp(uncond, cond, case.cfg_scale)[:, :guided], cond[:, guided:channels]], dim=1)
    mean = cx * x + (ce * case.plan.eps_scale) * eps
    if noise is None:
        return mean
    log_var = torch.lerp(min_log, max_log, (cond[:, channels:] + 1) / 2)
    return mean + (torch.exp(log_var / 2) * noise_on + sigma) * noise


@torch.no_grad()
def sample(case: Case, predict: Predict) -> Run:
    """A trajectory whose steps ``predict`` makes."""
    x, marks = case.noise[0], [mark(case.device)]
    start = time.perf_counter()
    for i in range(len(case.plan)):
        rows = torch.cat([x, x]).to(case.dtype)
        x = step_on(case, x, predict(rows, i), case.rows[i], case.noise_at(i))
        marks.append(mark(case.device))
    return Run(x, marks, time.perf_counter() - start)
