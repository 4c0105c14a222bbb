"""Ourselves: our own loop, a graph a step type, one for all, none, or in float8; and the drop-in in a user's loop."""

import time
from copy import copy
from dataclasses import replace

import torch

from bench.marks import mark
from bench.rivals.case import Case
from bench.rivals.loop import Run, sample
from bench.rivals.plain import timesteps_of
from bench.rivals.rival import Trajectory
from ebcache_fast import enable
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import no_graphs
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.options import EngineOptions


def own_loop(case: Case, *, whole: bool, fp8: bool = False) -> Trajectory:
    """`Engine.sampling`; on a GPU nothing may run but graphs."""
    on_gpu = case.device.type == "cuda"
    options = EngineOptions(strict=on_gpu, whole_trajectory=whole, fp8=fp8, max_trajectories=1)
    return trajectory(case, Engine(case.model, options))


def without_graphs(case: Case) -> Trajectory:
    """The same, operation by operation."""
    return trajectory(case, Engine(case.model, EngineOptions(max_trajectories=1), make_graphs=no_graphs))


def trajectory(case: Case, engine: Engine) -> Trajectory:
    """Our own loop over an engine. The modulation, which others compute at every step, is computed before the first."""
    guidance = Guidance(case.cfg_scale, case.guided_channels)

    def run() -> Run:
        began = mark(case.device)
        with engine.sampling(case.plan, case.labels, guidance, case.rows, case.noise, case.context) as running:
            marks, steps = [mark(case.device)], list[int]()
            start = time.perf_counter()
            while done := running.advance():
                marks.append(mark(case.device))
                steps.append(done)
            return Run(running.x.clone(), marks, time.perf_counter() - start, tuple(steps), began)

    return run


def drop_in(case: Case, *, in_order: bool) -> Trajectory:
    """The model's own forward, answered by us. eps is scaled there, so the loop must not do it again."""
    model, t, labels = share_weights(case.model), timesteps_of(case), case.row_labels
    enable(model, case.plan, in_order=in_order, strict=case.device.type == "cuda")
    unscaled = replace(case, plan=replace(case.plan, eps_scale=1.0))
    return lambda: sample(unscaled, lambda x, i: model(x, t[i], labels))


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Another module of the same layers, whose forward can be replaced without replacing the model's."""
    other = copy(model)
    vars(other).update({name: copy(vars(model)[name]) for name in ("_modules", "_parameters", "_buffers")})
    return other
