"""Steps and trajectories of the engine, timed: which there are, the least that each must do, and how long it takes."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from bench.ceilings import Ceilings
from bench.kernel_contenders import Work
from bench.marks import mark, seconds_between
from ebcache_fast.apps.bundled import load_letters
from ebcache_fast.engine.buffers import latent_dtype
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import cuda_graphs, no_graphs
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.step_scheduler import Dispatch, StepScheduler
from ebcache_fast.models import DIT_MODELS, as_denoiser
from ebcache_fast.plan import ModelShape, Plan, StepType
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.samplers import make_sampler

NO, ATTENTION, ATTN_MLP = StepType.NO_CACHE, StepType.ATTENTION, StepType.ATTN_MLP
CFG_SCALE = 1.5
# In turn: a step of every kind, each after one that keeps the device busy while the host goes ahead.
EVERY_KIND = NO, ATTENTION, NO, ATTN_MLP, NO, ATTN_MLP, ATTN_MLP, ATTN_MLP
STEPS = EVERY_KIND * 6
RELEASED = CacheTable.named("eb-cache-released-50").step_types  # 34 NO_CACHE, 16 ATTN_MLP in 12 runs
MIXED = (NO, *((NO, ATTENTION, ATTN_MLP, ATTN_MLP, ATTENTION, ATTN_MLP, ATTN_MLP) * 7))
TABLES: Mapping[str, tuple[StepType, ...]] = {"steps": STEPS, "released table": RELEASED, "mixed": MIXED}
KINDS = ("NO_CACHE", "ATTENTION", "ATTN_MLP", "run of 3 ATTN_MLP")

EAGER, BY_TYPE, WHOLE = "eager", "a graph a step type", "one graph"


class Size(NamedTuple):
    """A model and a batch, guided: there are twice as many rows."""

    label: str
    px: int  # of DiT-XL/2's pictures; 0 for the bundled letters
    samples: int


def contenders_of(table: str, device: torch.device) -> tuple[str, ...]:
    """Who competes: graphs need a GPU, and one graph of a whole trajectory has no steps to time."""
    if device.type != "cuda":
        return (EAGER,)
    return (EAGER, BY_TYPE) if table == "steps" else (EAGER, BY_TYPE, WHOLE)


@lru_cache(maxsize=1)
def model_of(px: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """DiT-XL/2 with random weights, none of them zero, or the bundled model."""
    if not px:
        return load_letters(device).model
    with torch.device("meta"):
        model = DIT_MODELS["DiT-XL/2"](input_size=px // 8)
    model = model.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


@cache
def plan_of(table: str, shape: ModelShape) -> Plan:
    """A table of `TABLES` for a model."""
    return plan_from(TABLES[table], shape)


def plan_from(types: Sequence[StepType], shape: ModelShape, sampler: str = "ddpm") -> Plan:
    """Steps of these types, over as many of a sampler's timesteps."""
    return Plan.from_types(types, make_sampler(sampler, len(types)).timesteps, shape.sites)


def kind_of(dispatch: Dispatch) -> str:
    """How a dispatch of `STEPS` is called."""
    name = dispatch.plan.type_name
    return name if dispatch.steps == 1 else f"run of {dispatch.steps} {name}"


def work_of(dispatch: Dispatch, plan: Plan, shape: ModelShape, rows: int, itemsize: int) -> Work:
    """The least that a dispatch must do: the modulation is computed before, and a run reads the cache once."""
    sizes = dict(shape.sizes)
    ends = sizes["patch_size"] ** 2 * (sizes["in_channels"] + sizes["out_channels"]) * shape.width
    bare = replace(shape, fixed_macs=ends * shape.tokens, fixed_weights=ends)
    step = plan.steps.index(dispatch.plan)
    macs, moved = plan.step_macs(bare)[step], plan.bytes_moved(bare, rows, itemsize)[step]
    return Work(moved, 2 * macs * rows * dispatch.steps)


class Times(NamedTuple):
    """Of one run."""

    dispatches: tuple[float, ...]  # seconds of each, or of all at once
    loop: float  # from the first to the last
    whole: float  # with what comes before the loop: modulation, noise


@dataclass(frozen=True)
class Contender:
    """One way to run a table."""

    engine: Engine
    plan: Plan
    samples: int

    @classmethod
    def of(cls, name: str, model: nn.Module, plan: Plan, samples: int) -> "Contender":
        make_graphs = no_graphs if name == EAGER else cuda_graphs
        options = EngineOptions(strict=name != EAGER, whole_trajectory=name == WHOLE, max_trajectories=1)
        return cls(Engine(model, options, make_graphs=make_graphs), plan, samples)

    def run(self) -> Times:
        """One trajectory, timed by the device where there is one that can."""
        denoiser, steps = self.engine.denoiser, len(self.plan)
        device = denoiser.weight().device
        labels = torch.arange(self.samples, device=device) % denoiser.num_classes
        shape = steps + 1, self.samples, *denoiser.latent_shape
        noise = torch.randn(shape, dtype=latent_dtype(denoiser), device=device)
        rows = torch.tensor(make_sampler("ddpm", steps).rows)
        start = mark(device)
        with self.engine.sampling(self.plan, labels, Guidance(CFG_SCALE), rows, noise) as trajectory:
            marks = [mark(device)]
            while trajectory.advance():
                marks.append(mark(device))
        dispatches = tuple(seconds_between(a, b) for a, b in pairwise(marks))
        return Times(dispatches, seconds_between(marks[0], marks[-1]), seconds_between(start, marks[-1]))


@dataclass(frozen=True)
class Measured:
    """Seconds by round, and the time under which nothing can come."""

    seconds: tuple[float, ...]
    work: Work
    floor: float
    whole: tuple[float, ...] = ()  # of trajectories, with what comes before the loop


def rounds_for(seconds: float, budget: float, most: int) -> int:
    """How many runs of so many seconds fit in the budget, at least three."""
    return max(3, min(most, math.floor(budget / max(seconds, 1e-9))))


def race(
    table: str, size: Size, model: nn.Module, names: Sequence[str], ceilings: Ceilings, budget: float, most: int
) -> dict[tuple[str, str], Measured]:
    """By contender and kind of step, or the table's name: contenders take turns, a trajectory each."""
    denoiser = as_denoiser(model)
    plan = plan_of(table, denoiser.shape)
    contenders = {name: Contender.of(name, model, plan, size.samples) for name in names}
    slowest = 0.0
    for one in contenders.values():
        one.run()  # allocates, compiles, captures
        slowest = max(slowest, one.run().whole)
    taken: dict[str, list[Times]] = {name: [] for name in names}
    for _ in range(rounds_for(slowest, budget, most)):
        for name, one in contenders.items():
            taken[name].append(one.run())
    dispatches = StepScheduler(plan).dispatches()
    rows, itemsize = 2 * size.samples, denoiser.weight().itemsize
    works = [work_of(each, plan, denoiser.shape, rows, itemsize) for each in dispatches]
    floors = [ceilings.floor_seconds(least) for least in works]
    if table != "steps":
        everything = Work(sum(least.bytes for least in works), sum(least.flops for least in works))
        return {
            (name, table): Measured(
                tuple(run.loop for run in runs), everything, sum(floors), tuple(run.whole for run in runs)
            )
            for name, runs in taken.items()
        }
    return dict(_by_kind(dispatches, works, floors, taken))


def _by_kind(
    dispatches: Sequence[Dispatch], works: Sequence[Work], floors: Sequence[float], taken: Mapping[str, list[Times]]
) -> Iterator[tuple[tuple[str, str], Measured]]:
    for kind in KINDS:
        places = [i for i, dispatch in enumerate(dispatches) if kind_of(dispatch) == kind]
        for name, runs in taken.items():
            seconds = tuple(statistics.median(run.dispatches[i] for i in places) for run in runs)
            yield (name, kind), Measured(seconds, works[places[-1]], floors[places[-1]])


Race = Callable[[str, Size], dict[tuple[str, str], Measured]]
