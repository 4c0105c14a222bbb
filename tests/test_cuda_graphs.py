"""What only CUDA can show of its graphs: the same bits as without them, no waiting, no growth, and a way out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accuracy import DEVICE
from constants import ATTENTION, ATTN_MLP, NO
from tiny import CLASSES, tiny_dit
from torch import Tensor

import ebcache_fast
from ebcache_fast import sample
from ebcache_fast.dropin import cached_forward
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.trajectory import Trajectory
from ebcache_fast.errors import CaptureError
from ebcache_fast.models import DiT
from ebcache_fast.ops import operations as ops
from ebcache_fast.plan import Branch, Plan, StepType, layered
from ebcache_fast.samplers import make_sampler, trajectory_noise

pytestmark = pytest.mark.gpu

PATTERNS = {
    "NO_CACHE": [NO] * 4,
    "ATTENTION": [NO, ATTENTION, ATTENTION, NO, ATTENTION],
    "ATTN_MLP": [NO, *[ATTN_MLP] * 4, NO, ATTN_MLP],
    "mixed": [NO, ATTENTION, ATTN_MLP, StepType.MLP, NO, ATTN_MLP, ATTN_MLP, ATTENTION, NO],
}
LABELS = [1, 4, 0]
STRICT = {
    "a graph a step type": EngineOptions(strict=True),
    "one graph": EngineOptions(strict=True, whole_trajectory=True),
}
Eager = partial(Engine, make_graphs=lambda _: None)


def model_in(dtype: torch.dtype) -> DiT:
    return tiny_dit(5, dtype, hidden_size=32).to(DEVICE).requires_grad_(False)


def plan_of(types: list[StepType]) -> Plan:
    sites = layered(2, (Branch.SELF_ATTN, Branch.MLP))
    return Plan.from_types(types, make_sampler("ddpm", len(types)).timesteps, sites, 0.97)


@contextmanager
def trajectory_of(engine: Engine, plan: Plan) -> Iterator[Trajectory]:
    """A run of our own loop, all of whose operands are on the device already."""
    stepper = make_sampler("ddpm", len(plan))
    noise = trajectory_noise(0, range(len(LABELS)), len(plan), (4, 8, 8)).to(DEVICE)
    labels, rows = torch.tensor(LABELS, device=DEVICE), torch.tensor(stepper.rows, device=DEVICE)
    with engine.sampling(plan, labels, Guidance(1.5), rows, noise) as trajectory:
        yield trajectory


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def call_through(model: DiT, plan: Plan, calls: slice = slice(None)) -> list[Tensor]:
    """The outputs of an enabled model's calls, one a step, for latents that don't depend on them."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(plan), 2 * len(LABELS), 4, 8, 8, generator=generator).to(DEVICE, model.pos_embed.dtype)
    y = torch.tensor([*LABELS, *[CLASSES] * len(LABELS)], device=DEVICE)
    t = torch.tensor(plan.timesteps, device=DEVICE).unsqueeze(1).expand(-1, len(y)).contiguous()
    return [model.forward_with_cfg(x[i], t[i], y, 1.5) for i in range(len(plan))[calls]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", STRICT.values(), ids=STRICT)
@pytest.mark.parametrize("types", PATTERNS.values(), ids=PATTERNS)
def test_graphs_give_the_bits_of_the_same_kernels_without(
    types: list[StepType], options: EngineOptions, dtype: torch.dtype
) -> None:
    model, plan = model_in(dtype), plan_of(types)
    engine = Engine(model, options)
    expected = sample(model, LABELS, table=plan, seed=3, engine=Eager(model))
    for _ in range(2):  # the second run replays what the first captured
        assert torch.equal(sample(model, LABELS, table=plan, seed=3, engine=engine), expected)
    assert engine.stats.replays > 0
    assert not engine.stats.eager


@pytest.mark.parametrize("in_order", [False, True])
def test_drop_in_by_graphs_gives_the_bits_of_the_same_kernels_without(in_order: bool) -> None:
    model, plan = model_in(torch.bfloat16), plan_of(PATTERNS["mixed"])
    with patch.object(cached_forward, "Engine", Eager), ebcache_fast.enabled(model, plan, in_order=in_order):
        expected = call_through(model, plan)
    with ebcache_fast.enabled(model, plan, in_order=in_order, strict=True):
        for _ in range(2):
            outputs = call_through(model, plan)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))
        assert ebcache_fast.stats(model).replays == 2 * len(plan)


@pytest.mark.parametrize("options", STRICT.values(), ids=STRICT)
def test_our_own_loop_never_waits(options: EngineOptions) -> None:
    engine, plan = Engine(model_in(torch.bfloat16), options), plan_of(PATTERNS["mixed"])
    for _ in range(2):
        with trajectory_of(engine, plan) as trajectory, no_waiting():
            while trajectory.advance():
                pass
    assert not engine.stats.eager


def test_drop_in_that_trusts_the_order_never_waits_between_its_first_call_and_its_last() -> None:
    model, plan = model_in(torch.bfloat16), plan_of(PATTERNS["mixed"])
    with ebcache_fast.enabled(model, plan, in_order=True, strict=True):
        for _ in range(2):
            call_through(model, plan, slice(0, 1))
            generator = torch.Generator().manual_seed(2)
            x = torch.randn(2 * len(LABELS), 4, 8, 8, generator=generator).to(DEVICE, torch.bfloat16)
            y = torch.tensor([*LABELS, *[CLASSES] * len(LABELS)], device=DEVICE)
            steps = [torch.full((len(y),), t, device=DEVICE) for t in plan.timesteps]
            with torch.no_grad(), no_waiting():
                for t in steps[1:-1]:
                    model.forward_with_cfg(x, t, y, 1.5)
            out = model.forward_with_cfg(x, steps[-1], y, 1.5)
            assert bool(out.isfinite().all())


def test_runs_on_streams_of_their_own_follow_one_another() -> None:
    model, plan = model_in(torch.float32), plan_of(PATTERNS["mixed"])
    engine, streams = Engine(model, EngineOptions(strict=True)), [torch.cuda.Stream() for _ in range(3)]
    expected = sample(model, LABELS, table=plan, seed=3, engine=Eager(model))
    found = []
    for stream in streams * 3:  # nobody waits in between, and all use one memory
        with torch.cuda.stream(stream):
            found.append(sample(model, LABELS, table=plan, seed=3, engine=engine))
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.slow
def test_ten_thousand_steps_have_the_bits_of_the_same_kernels_without_graphs() -> None:
    model, plan = model_in(torch.bfloat16), plan_of(PATTERNS["mixed"])
    by_graphs, eager = Engine(model, EngineOptions(strict=True)), Eager(model)
    for seed in range(10_000 // len(plan) + 1):
        ours = sample(model, LABELS, table=plan, seed=seed, engine=by_graphs)
        assert torch.equal(ours, sample(model, LABELS, table=plan, seed=seed, engine=eager)), seed
    assert sum(by_graphs.stats.steps.values()) > 10_000


def test_ten_thousand_replays_take_no_more_memory() -> None:
    engine, plan = Engine(model_in(torch.bfloat16), EngineOptions(strict=True)), plan_of(PATTERNS["mixed"])

    def run() -> None:
        with trajectory_of(engine, plan) as trajectory:
            while trajectory.advance():
                pass

    run()
    run()
    torch.cuda.synchronize()
    before, replays = torch.cuda.memory_allocated(), engine.stats.replays
    while engine.stats.replays < replays + 10_000:
        run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def operations_that_wait_in_a_capture() -> ops.Operations:
    """The kernels, of which one waits for the device: CUDA ends the capture for that."""
    usual = ops.triton_operations()

    def waits(*args: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        usual.embed_norm_modulate(*args)

    return replace(usual, embed_norm_modulate=waits)


def test_a_capture_that_fails_falls_back_and_leaves_cuda_as_it_was() -> None:
    model, plan = model_in(torch.bfloat16), plan_of(PATTERNS["mixed"])
    expected = sample(model, LABELS, table=plan, engine=Eager(model))
    engine, stream = Engine(model, operations=operations_that_wait_in_a_capture()), torch.cuda.current_stream()
    for _ in range(2):
        assert torch.equal(sample(model, LABELS, table=plan, engine=engine), expected)
    (reason,) = engine.stats.eager
    assert "capture failed" in reason
    assert torch.cuda.current_stream() == stream
    assert engine.stats.replays > 0  # ATTENTION and ATTN_MLP steps do not embed that way
    healthy = Engine(model, EngineOptions(strict=True))
    assert torch.equal(sample(model, LABELS, table=plan, engine=healthy), expected)


def test_a_capture_that_fails_raises_where_that_is_asked_for() -> None:
    model, stream, plan = model_in(torch.bfloat16), torch.cuda.current_stream(), plan_of(PATTERNS["NO_CACHE"])
    engine = Engine(model, EngineOptions(strict=True), operations=operations_that_wait_in_a_capture())
    with pytest.raises(CaptureError, match="strict=False"):
        sample(model, LABELS, table=plan, engine=engine)
    assert torch.cuda.current_stream() == stream
    # After a failed capture torch's generator may still take itself for captured, until another one succeeds.
    sample(model, LABELS, table=plan, engine=Engine(model, EngineOptions(strict=True)))
    assert bool(torch.randn(4, device=DEVICE).isfinite().all())


def test_graphs_need_none_of_the_memory_that_torch_keeps_for_cublas() -> None:
    """torch.compile's own graphs give all of it back, wherever one is recorded; whoever gets it next may fill it."""
    model = tiny_dit(5, torch.bfloat16, hidden_size=1024, num_heads=16).to(DEVICE).requires_grad_(False)
    plan = plan_of([NO] * 4)
    engine = Engine(model, EngineOptions(strict=True))
    expected = sample(model, LABELS, table=plan, seed=3, engine=engine)
    torch._C._cuda_clearCublasWorkspaces()
    taken = torch.full((64, 2**20), torch.nan, device=DEVICE)
    torch.cuda.empty_cache()
    assert torch.equal(sample(model, LABELS, table=plan, seed=3, engine=engine), expected)
    assert bool(taken.isnan().all())
