"""torch.compile: of the whole model, and of one plain forward for each step type, captured by hand."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.marks import mark
from bench.rivals.case import Case
from bench.rivals.loop import Run, step_on
from bench.rivals.plain import forward, module, timesteps_of
from bench.rivals.rival import Trajectory
from ebcache_fast.engine.graphs import cuda_graphs
from ebcache_fast.plan import StepType

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def options_of(case: Case, mode: str, *, fullgraph: bool = True) -> dict[str, Any]:
    """torch.compile's, for a mode; on a CPU, where nothing is measured, all of it runs but the code generation."""
    how = {"mode": mode} if case.device.type == "cuda" else {"backend": "aot_eager"}
    return how | {"dynamic": False, "fullgraph": fullgraph}


def compiler(case: Case, mode: str, *, fullgraph: bool = True) -> Compile:
    """torch.compile in a mode."""
    return partial(torch.compile, **options_of(case, mode, fullgraph=fullgraph))


def whole_model(case: Case, mode: str) -> Trajectory:
    """The model's own forward compiled, at every step; its graphs hand out memory that the next call overwrites."""
    call = compiler(case, mode)(case.model.forward)

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return call(x, t, y)

    return module(case, predict)


class StaticOutputs:
    """Outputs in memory of their own, (L, 2, R, T, D), which graphs can read."""

    def __init__(self, case: Case) -> None:
        shape = case.denoiser.shape
        sizes = shape.depth, 2, 2 * case.samples, shape.tokens, shape.width
        self._memory = torch.zeros(sizes, dtype=case.dtype, device=case.device)

    def put(self, layer: int, branch: int, output: Tensor) -> Tensor:
        self._memory[layer, branch].copy_(output)
        return output

    def get(self, layer: int, branch: int) -> Tensor:
        return self._memory[layer, branch]


class ByStepType:
    """The strongest that torch offers: a compiled step for each type, sampler included, and a CUDA graph of each.

    It follows the same table. What it lacks is that it knows the whole trajectory: modulation is computed at every
    step, layer by layer, and so is a step that computes no branch.
    """

    def __init__(self, case: Case) -> None:
        self._case, self._t = case, timesteps_of(case)
        self._now_t, self._now_row = self._t[0].clone(), case.rows[0].clone()
        self._now_noise, self._x = case.noise[0].clone(), case.noise[0].clone()
        kept, compiled = StaticOutputs(case), compiler(case, "max-autotune-no-cudagraphs")
        self._graphs, labels, dtype = cuda_graphs(case.device), case.row_labels, case.dtype

        def step(step_type: StepType) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
            def body(x: Tensor, t: Tensor, row: Tensor, noise: Tensor) -> Tensor:
                out = forward(case.model, torch.cat([x, x]).to(dtype), t, labels, step_type, kept)
                return step_on(case, x, out, row, noise)

            return compiled(body)

        self._launch = {each: self._captured(step(each)) for each in sorted(set(case.types))}

    def _captured(self, step: Callable[..., Tensor]) -> Callable[[], object]:
        def body() -> None:
            self._x.copy_(step(self._x, self._now_t, self._now_row, self._now_noise))

        if self._graphs is None:
            return body
        with torch.no_grad():
            for _ in range(3):  # compiles it, the first time
                body()
            return self._graphs.capture(body, ()).replay

    @torch.no_grad()
    def __call__(self) -> Run:
        """A trajectory."""
        case = self._case
        self._x.copy_(case.noise[0])
        marks, start = [mark(case.device)], time.perf_counter()
        for i, step_type in enumerate(case.types):
            self._now_t.copy_(self._t[i])
            self._now_row.copy_(case.rows[i])
            self._now_noise.copy_(case.noise[i + 1])
            self._launch[step_type]()
            marks.append(mark(case.device))
        return Run(self._x.clone(), marks, time.perf_counter() - start)
