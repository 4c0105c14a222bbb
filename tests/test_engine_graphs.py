"""The engine over fake graphs: what is captured, that replays are the eager bits, and that nothing goes stale."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, MLP, NO
from fake_graphs import FakeGraphs
from fake_runs import (
    SMALLEST,
    Job,
    arguments,
    bits,
    call,
    calls,
    eager_states,
    enable_over,
    engine_of,
    labels_of,
    mixed_plan,
    no_graphs,
    over,
    plan_of,
    sampling,
    states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_dit
from torch import Tensor

from ebcache_fast import disable
from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import TrajectoryError
from ebcache_fast.models import DiT
from ebcache_fast.ops import operations as ops
from ebcache_fast.plan import StepType

JOB = Job(plan_of())
SOLVED = replace(JOB, sampler="dpm-solver++")
MIXED = Job(mixed_plan(["CC CC", "RC CR", "RR RR", "RR RR", "RR RC"]))
VIEWS = {"aten.slice.Tensor", "aten.alias.default"}
COPY = "aten.copy_.default"
# t, y and x into static memory; after the replay the output's copy, a look at the flag on the host, and its next copy.
AROUND_A_REPLAY = [COPY] * 3 + ["aten.clone.default", "aten._local_scalar_dense.default", COPY]


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: object) -> DiT:
    return tiny_dit(seed, dtype, **{**SMALLEST, **sizes})


MODEL = tiny()


def engine_over(graphs: FakeGraphs, model: DiT = MODEL, **options: bool | int) -> Engine:
    return Engine(model, EngineOptions(**options), make_graphs=over(graphs))


def quick_engine(graphs: FakeGraphs, model: DiT = MODEL, **options: bool | int) -> Engine:
    """The same of few nodes: an operation is one, as a kernel is."""
    return Engine(model, EngineOptions(**options), graphs.wrap(ops.TORCH), over(graphs))


# ------------------------------------------------------------------------------------------- capture and dispatch


def test_a_graph_for_each_kind_of_step_and_length_of_run_all_captured_before_the_first_replay() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs)
    with sampling(engine, JOB) as trajectory:
        assert (graphs.captures, graphs.replays) == (5, 0)  # NO, ATTENTION, MLP, runs of 3 and 1
        steps = []
        while done := trajectory.advance():
            steps.append(done)
    assert steps == [1, 1, 3, 1, 1, 1]
    assert (graphs.captures, graphs.replays) == (5, 6)
    stats = engine.stats
    assert (stats.graphs, stats.replays, dict(stats.eager)) == (5, 6, {})
    assert stats.steps == {"NO_CACHE": 2, "ATTENTION": 1, "MLP": 1, "ATTN_MLP": 4}
    assert stats.hits == 2 + 2 + 4 * 4


def test_the_drop_in_has_a_graph_for_each_kind_of_step() -> None:
    graphs = FakeGraphs()
    model = enable_over(over(graphs), tiny(), JOB.plan, graphs.wrap(ops.TORCH))
    calls(model, JOB)
    assert (graphs.captures, graphs.replays) == (4, len(JOB.plan))
    assert engine_of(model).stats.replays == len(JOB.plan)


@pytest.mark.parametrize("first", [JOB, SOLVED], ids=lambda job: job.sampler)
def test_the_whole_trajectory_as_one_graph(first: Job) -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs, whole_trajectory=True)
    for seed in (0, 1):
        job = replace(first, seed=seed)
        with sampling(engine, job) as trajectory:
            assert trajectory.advance() == len(job.plan)
            assert trajectory.advance() == 0
            assert bits([trajectory.x]) == bits(eager_states(MODEL, job)[-1:])
    assert (graphs.captures, graphs.replays, engine.stats.replays) == (1, 2, 2)
    assert engine.stats.steps["ATTN_MLP"] == 2 * 4


REUSED = {
    "the same": JOB,
    "labels": replace(JOB, labels=(3, 0)),  # in the other order, too
    "seed": replace(JOB, seed=5),
    "scale": replace(JOB, scale=4.0),
    "b": replace(JOB, plan=replace(JOB.plan, eps_scale=0.5)),
    "timesteps": replace(JOB, plan=replace(JOB.plan, timesteps=tuple(range(990, 190, -100)))),
}
ANOTHER = {
    "batch": (replace(JOB, labels=(1, 4, 2)), 5),
    "guidance": (replace(JOB, scale=1.0), 5),
    "guided channels": (replace(JOB, channels=1), 5),
    "sampler": (replace(JOB, sampler="ddim"), 5),
    "sampler with a memory": (SOLVED, 5),
    "live slots": (Job(plan_of((NO, ATTENTION, *[NO] * 6))), 2),
    "steps": (Job(plan_of((NO, ATTN_MLP))), 2),
}


def test_a_run_remembers_nothing_of_the_one_before() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs)
    for seed in (0, 1):
        job = replace(SOLVED, seed=seed)
        assert bits(states(engine, job)) == bits(eager_states(MODEL, job))
    assert graphs.captures == 5


@pytest.mark.parametrize("job", REUSED.values(), ids=REUSED)
def test_memory_and_graphs_are_used_again_and_nothing_in_them_is_stale(job: Job) -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs)
    first = bits(states(engine, JOB))
    held = engine.stats.cache_bytes
    with sampling(engine, JOB) as trajectory:
        memory = trajectory.x.data_ptr()
        trajectory.advance()  # and no further
    with sampling(engine, job) as trajectory:
        assert trajectory.x.data_ptr() == memory
    again = bits(states(engine, job))
    assert again == bits(eager_states(MODEL, job))
    assert (again == first) == (job is JOB)
    assert (graphs.captures, engine.stats.cache_bytes) == (5, held)


@pytest.mark.parametrize(("job", "captures"), ANOTHER.values(), ids=ANOTHER)
def test_a_trajectory_of_another_kind_has_memory_and_graphs_of_its_own(job: Job, captures: int) -> None:
    graphs, model = FakeGraphs(), tiny(in_channels=2)
    engine = quick_engine(graphs, model)
    with sampling(engine, JOB) as trajectory:
        memory = trajectory.x.data_ptr()
    with sampling(engine, job) as trajectory:
        assert trajectory.x.data_ptr() != memory
    assert graphs.captures == 5 + captures == engine.stats.graphs
    assert bits(states(engine, job)) == bits(eager_states(model, job))


def test_another_table_of_equal_needs_shares_memory_and_what_kinds_of_step_it_has() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs)
    states(engine, JOB)
    other = Job(plan_of((NO, MLP, ATTN_MLP, ATTN_MLP, ATTN_MLP, NO, NO, ATTENTION)))
    assert bits(states(engine, other)) == bits(eager_states(MODEL, other))
    assert graphs.captures == 5
    rarer = Job(mixed_plan(["CC CC", "RR CC", *["RR RR"] * 6]))
    assert bits(states(engine, rarer)) == bits(eager_states(MODEL, rarer))
    assert graphs.captures == 6


@pytest.mark.parametrize("in_order", [False, True])
def test_the_drop_in_and_our_own_loop_share_nothing(in_order: bool) -> None:
    graphs = FakeGraphs()
    model = enable_over(over(graphs), tiny(), JOB.plan, graphs.wrap(ops.TORCH), in_order=in_order)
    calls(model, JOB)
    states(engine_of(model), JOB)
    calls(model, JOB)
    assert graphs.captures == 4 + 5


def test_beyond_max_graphs_steps_run_eagerly_and_are_counted() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs, max_graphs=2)
    assert bits(states(engine, JOB)) == bits(eager_states(MODEL, JOB))
    stats = engine.stats
    assert (graphs.captures, stats.graphs, stats.replays) == (2, 2, 3)  # NO twice, ATTENTION
    assert dict(stats.eager) == {"the limit of graphs was reached; raise max_graphs": len(JOB.plan) - 3}
    states(engine, replace(JOB, labels=(1,)))
    assert (graphs.captures, engine.stats.graphs) == (4, 2)  # of all buffers together: idle ones gave way


def test_a_step_after_a_capture_is_its_own_wherever_the_run_before_had_come_to() -> None:
    """Captures move the clock: memory that was left at step 2 is at another step after them."""
    labels, x = torch.tensor([1, 4]), arguments(MODEL, JOB, 0)[0][:2]

    def second_step(engine: Engine, others: list[tuple[StepType, ...]]) -> Tensor:
        for types in others:
            run = engine.forward_run(plan_of(types), Batch(labels, 2, 0, engine.denoiser.latent_shape), Tail())
            run.predict(0, x)
            run.predict(1, x)
            engine.release(run.buffer_set)
        run = engine.forward_run(
            plan_of((NO, ATTENTION, ATTN_MLP, NO)), Batch(labels, 2, 0, engine.denoiser.latent_shape), Tail()
        )
        return run.run_full(2, x)

    ours = second_step(quick_engine(FakeGraphs()), [(NO, ATTN_MLP, ATTN_MLP, NO)])
    assert torch.equal(ours, second_step(Engine(MODEL, make_graphs=no_graphs), []))


def test_as_many_trajectories_as_allowed_and_one_that_ends_makes_room() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs, max_trajectories=2)
    with sampling(engine, JOB) as first, sampling(engine, JOB) as second:
        assert first.x.data_ptr() != second.x.data_ptr()
        with pytest.raises(TrajectoryError, match=r"2 trajectories are in progress.*max_trajectories=2"):
            states(engine, JOB)
    states(engine, JOB)
    assert graphs.captures == 2 * 5


def test_memory_beyond_max_trajectories_is_freed_that_used_longest_ago_first() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs, max_trajectories=2)
    one, two, three = (Job(plan_of((NO, MLP)), (1,) * n) for n in (1, 2, 3))
    for job in (one, two, one, three):
        states(engine, job)
    assert graphs.captures == 3 * 2
    gc.collect()
    assert len(graphs.alive) == engine.stats.graphs == 2 * 2
    states(engine, one)
    assert graphs.captures == 3 * 2
    states(engine, two)
    assert graphs.captures == 4 * 2


def test_nothing_outlives_an_engine_or_a_model_that_is_disabled() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs)
    with sampling(engine, JOB) as trajectory:
        cache = weakref.ref(trajectory._buffer_set.buffers.cache)
    assert cache() is not None
    del engine, trajectory
    gc.collect()
    assert (len(graphs.alive), cache()) == (0, None)
    model = enable_over(over(graphs), tiny(), JOB.plan, graphs.wrap(ops.TORCH))
    calls(model, JOB)
    assert len(graphs.alive) == 4
    disable(model)
    gc.collect()
    assert len(graphs.alive) == 0


def test_no_memory_that_outlasts_a_step_is_made_inside_a_capture() -> None:
    with sampling(quick_engine(FakeGraphs()), JOB) as trajectory:
        while trajectory.advance():
            pass
        workspace = trajectory._buffer_set.buffers.workspace.tensors
        assert workspace
        assert all(tensor.isfinite().all() for tensor in workspace)  # memory of a graph is poison between replays


def test_a_trajectory_that_nobody_ends_gives_its_memory_back_when_it_is_forgotten() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs, max_trajectories=1)
    run = sampling(engine, JOB)
    run.__enter__().advance()
    del run
    assert bits(states(engine, JOB)) == bits(eager_states(MODEL, JOB))
    assert graphs.captures == 5


# ----------------------------------------------------------------------------------- nothing but replays in a run


def test_between_the_first_and_the_last_replay_of_our_own_loop_nothing_runs() -> None:
    graphs = FakeGraphs()
    engine = quick_engine(graphs)
    for _ in range(2):
        with sampling(engine, JOB) as trajectory, graphs.quiet() as heard:
            while trajectory.advance():
                pass
        assert heard == ["aten.fill_.Scalar"]  # the clock, before the first


def test_a_call_of_the_drop_in_that_is_trusted_copies_into_static_memory_and_hands_out_a_copy() -> None:
    graphs = FakeGraphs()
    model = enable_over(over(graphs), tiny(), JOB.plan, graphs.wrap(ops.TORCH), in_order=True)
    for _ in range(2):
        labels = labels_of(JOB)
        call(model, JOB, 0, labels)
        for step in range(1, len(JOB.plan) - 1):
            inputs = arguments(model, JOB, step, labels)
            replays = graphs.replays
            with graphs.quiet() as heard, torch.no_grad():
                model.forward_with_cfg(*inputs, JOB.scale)
            work = [name for name in heard if name not in VIEWS]
            assert (work, graphs.replays) == (AROUND_A_REPLAY, replays + 1)
        call(model, JOB, len(JOB.plan) - 1, labels)


# --------------------------------------------------------------------------------------------- graph against eager


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
FORMS = [
    (F64, "ddpm", 1.5),
    (F64, "ddim", 1.0),
    (F32, "ddpm", 1.0),
    (F32, "ddim", 1.5),
    (BF16, "ddpm", 1.5),
    (BF16, "ddim", 1.0),
]


@pytest.mark.parametrize(("dtype", "sampler", "scale"), FORMS)
def test_replays_of_our_own_loop_are_the_eager_bits(dtype: torch.dtype, sampler: str, scale: float) -> None:
    model, job = tiny(dtype), replace(MIXED, sampler=sampler, scale=scale)
    assert bits(states(engine_over(FakeGraphs(), model, strict=True), job)) == bits(eager_states(model, job))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(("in_order", "scale"), [(False, 1.5), (True, 1.5), (True, 1.0)])
def test_replays_of_the_drop_in_are_the_eager_bits(dtype: torch.dtype, in_order: bool, scale: float) -> None:
    job, options = replace(MIXED, scale=scale), {"in_order": in_order, "strict": True}
    replayed, eager = (
        calls(enable_over(make, tiny(dtype), job.plan, **options), job) for make in (over(FakeGraphs()), no_graphs)
    )
    assert bits(replayed) == bits(eager)
    assert replayed[0].dtype == dtype


@given(rows=st.lists(st.lists(st.sampled_from(["CC", "CR", "RC", "RR"]), min_size=3, max_size=3), max_size=4))
@settings(max_examples=8)
def test_replays_of_any_plan_are_the_eager_bits(rows: list[list[str]]) -> None:
    job, model = Job(mixed_plan(["CC CC CC", *map(" ".join, rows)]), labels=(2,)), tiny(depth=3)
    assert bits(states(engine_over(FakeGraphs(), model), job)) == bits(eager_states(model, job))


def test_replays_of_the_triton_kernels_are_their_eager_bits() -> None:
    model, graphs, job = tiny_dit(0, torch.float32, depth=1), FakeGraphs(), Job(plan_of((NO, ATTN_MLP, ATTN_MLP), 1))
    kernels = graphs.wrap(replace(ops.own_matmul_operations(), attention=None))
    engine = Engine(model, EngineOptions(strict=True), kernels, over(graphs))
    assert bits(states(engine, job)) == bits(eager_states(model, job, kernels))
    assert graphs.captures == 2
    assert "run_update" in {name for graph in graphs.alive for name in graph.nodes}
