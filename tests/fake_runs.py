"""Runs of tiny models over fake graphs: one job through our own loop, or through the model's own forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, BRANCHES, MLP, NO
from fake_graphs import FakeGraphs
from tiny import CLASSES, naive_timesteps
from torch import Tensor, nn

from ebcache_fast import enable
from ebcache_fast.dropin import cached_forward
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import Graphs, no_graphs
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.trajectory import Trajectory
from ebcache_fast.models import DiT, as_denoiser
from ebcache_fast.ops.operations import Operations
from ebcache_fast.plan import COMPUTE, REUSE, Plan, StepPlan, StepType, layered
from ebcache_fast.samplers import Sampler, sampler_over, trajectory_noise
from ebcache_fast.samplers.schedule import NoiseSchedule

TYPES = (NO, ATTENTION, ATTN_MLP, ATTN_MLP, ATTN_MLP, ATTN_MLP, MLP, NO)
SMALLEST = {"hidden_size": 8, "input_size": 4, "patch_size": 2, "in_channels": 1, "num_heads": 1}

MakeGraphs = Callable[[torch.device], Graphs | None]


def over(graphs: FakeGraphs) -> MakeGraphs:
    """The same fake graphs for all of an engine's buffers, so that they count everything."""
    return lambda _: graphs


def plan_of(types: Sequence[StepType] = TYPES, depth: int = 2, eps_scale: float = 0.9) -> Plan:
    """These steps, over timesteps spread evenly."""
    return Plan.from_types(types, naive_timesteps(len(types)), layered(depth, BRANCHES), eps_scale)


def mixed_plan(rows: Sequence[str], eps_scale: float = 0.9) -> Plan:
    """A plan layer by layer: of each step "CR CC", say, with C for a branch that computes and R for one that reuses."""
    action = {"C": COMPUTE, "R": REUSE}
    layers = (tuple(tuple(action[c] for c in layer) for layer in row.split()) for row in rows)
    return Plan(tuple(StepPlan.by_layer(BRANCHES, one) for one in layers), tuple(naive_timesteps(len(rows))), eps_scale)


@dataclass(frozen=True)
class Job:
    """One batch under one plan; the same job gives the same bits."""

    plan: Plan
    labels: tuple[int, ...] = (1, 4)
    scale: float = 1.5
    channels: int = 3
    sampler: str = "ddpm"
    seed: int = 0

    @cached_property
    def stepper(self) -> Sampler:
        """The sampler over the plan's timesteps."""
        return sampler_over(self.sampler, NoiseSchedule.linear(1000).respace(self.plan.timesteps))

    @property
    def is_guided(self) -> bool:
        """Whether there are unconditional rows."""
        return self.scale != 1.0


# ------------------------------------------------------------------------------------------------ our own loop


@contextmanager
def sampling(engine: Engine, job: Job) -> Iterator[Trajectory]:
    """The job begun in our own loop."""
    drawn = len(job.plan) if job.stepper.draws_noise else 0
    noise = trajectory_noise(job.seed, range(len(job.labels)), drawn, engine.denoiser.latent_shape)
    guidance, rows = Guidance(job.scale, job.channels), torch.tensor(job.stepper.rows)
    with engine.sampling(job.plan, torch.tensor(job.labels), guidance, rows, noise) as trajectory:
        yield trajectory


def states(engine: Engine, job: Job) -> list[Tensor]:
    """The latents after each launch of our own loop."""
    with sampling(engine, job) as trajectory:
        found = []
        while trajectory.advance():
            found.append(trajectory.x.clone())
    return found


def eager_states(model: nn.Module, job: Job, operations: Operations | None = None) -> list[Tensor]:
    """The same from an engine of its own, without graphs."""
    return states(Engine(model, operations=operations, make_graphs=no_graphs), job)


# --------------------------------------------------------------------------------------------------- the drop-in


def enable_over(
    make_graphs: MakeGraphs, model: DiT, plan: Plan, operations: Operations | None = None, **options: bool | int
) -> DiT:
    """`enable`, with an engine that captures with these graphs and runs these operations."""
    with pytest.MonkeyPatch.context() as patch:
        seam = partial(Engine, operations=operations, make_graphs=make_graphs)
        patch.setattr(cached_forward, "Engine", seam)
        enable(model, plan, **options)
        engine_of(model)  # made when first asked for: here
    return model


def engine_of(model: DiT) -> Engine:
    """The engine behind an enabled model's forward."""
    return vars(model)[cached_forward.ATTRIBUTE].engine  # type: ignore[no-any-return]


def labels_of(job: Job) -> Tensor:
    """A tensor of all rows' labels for a run to hold."""
    return torch.tensor([*job.labels, *[CLASSES] * len(job.labels)] if job.is_guided else job.labels)


def arguments(model: DiT, job: Job, step: int, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y of one call, with latents of the step's own, and labels made anew unless given."""
    generator, shape = torch.Generator().manual_seed(1000 * job.seed + step), as_denoiser(model).latent_shape
    x = torch.randn(len(job.labels), *shape, generator=generator).to(next(model.parameters()).dtype)
    y = labels_of(job) if y is None else y
    return torch.cat([x, x]) if job.is_guided else x, torch.full((len(y),), job.plan.timesteps[step]), y


@torch.no_grad()
def call(model: DiT, job: Job, step: int, y: Tensor | None = None) -> Tensor:
    """One call of a loop around the model."""
    inputs = arguments(model, job, step, y)
    return model.forward_with_cfg(*inputs, job.scale) if job.is_guided else model(*inputs)


def calls(model: DiT, job: Job, start: int = 0) -> list[Tensor]:
    """The calls of a loop that holds its labels; from some step on of one that makes them anew."""
    y = None if start else labels_of(job)
    return [call(model, job, step, y) for step in range(start, len(job.plan))]


# ------------------------------------------------------------------------------------------------------- comparing


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    """All bits of each, and its shape and dtype, so that NaN equals NaN, and 0 not -0."""
    return [f"{t.shape} {t.dtype}".encode() + t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]
