"""Our own loop with one switch more at a time, from plain torch on: what each buys."""

from functools import partial
from unittest.mock import patch

from bench.rivals import plain
from bench.rivals.case import Case
from bench.rivals.loop import Run
from bench.rivals.ours import trajectory
from bench.rivals.rival import Rival, Trajectory
from ebcache_fast.engine import engine as engines
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import no_graphs
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.step_scheduler import Dispatch, StepScheduler
from ebcache_fast.ops import operations as ops


class SingleSteps(StepScheduler):
    """Every step a dispatch of its own: no run kernel."""

    def dispatches(self) -> tuple[Dispatch, ...]:
        return tuple(Dispatch(step, 1) for step in self.plan.steps)


def one_by_one(run: Trajectory) -> Trajectory:
    """The same without the run kernel."""

    def without_runs() -> Run:
        with patch.object(engines, "StepScheduler", SingleSteps):
            return run()

    return without_runs


def on_torch(case: Case) -> Trajectory:
    """The engine over plain torch operations, step by step: what it knows of the trajectory, and nothing else."""
    return one_by_one(trajectory(case, Engine(case.model, operations=ops.TORCH, make_graphs=no_graphs)))


def on_kernels(case: Case) -> Trajectory:
    """Fused kernels, launched by the host."""
    return one_by_one(trajectory(case, Engine(case.model, make_graphs=no_graphs)))


def by_graphs(case: Case, *, pdl: bool = False, whole: bool = False) -> Trajectory:
    """By graphs, with the run kernel; a CPU has neither, and launches nothing early."""
    on_gpu = case.device.type == "cuda"
    options = EngineOptions(on_gpu, whole_trajectory=whole, pdl=pdl and on_gpu, max_trajectories=1)
    return trajectory(case, Engine(case.model, options))


def by_single_graphs(case: Case) -> Trajectory:
    """By graphs, without it."""
    return one_by_one(by_graphs(case))


SWITCHES: tuple[Rival, ...] = (
    Rival("plain", "EB-Cache in plain torch, eager", plain.eager),
    Rival("+ modulation", "modulation of the whole trajectory at once, on torch operations", on_torch),
    Rival("+ kernels", "fused Triton kernels", on_kernels),
    Rival("+ graphs", "a CUDA graph a step type", by_single_graphs),
    Rival("+ runs", "runs of ATTN_MLP steps in one kernel", by_graphs),
    Rival("+ dependent launch", "kernels launched early", partial(by_graphs, pdl=True)),
    Rival("+ one graph", "and one graph for all steps", partial(by_graphs, pdl=True, whole=True)),
)
