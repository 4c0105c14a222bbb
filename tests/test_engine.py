"""The parts of one sampling run: caches, modulation, guidance, and the trajectory that owns them."""

import copy
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from constants import BRANCHES
from fake_graphs import FakeGraphs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLASSES, LayerReuse, empty_cache, naive_predict, relative_error, tiny_dit
from torch import Tensor, nn

from ebcache_fast.engine.buffers import Tail, latent_dtype
from ebcache_fast.engine.cache import FeatureCache
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.trajectory import Prediction, split
from ebcache_fast.errors import InputError, TrajectoryError
from ebcache_fast.models import DiT, DiTDenoiser
from ebcache_fast.plan import COMPUTE, REUSE, Memory, Plan, Slot, StepPlan, StepType, layered

DEPTH = 3
TIMESTEPS = (930, 700, 420, 260, 111, 3)
TYPES = [StepType.NO_CACHE, StepType.ATTENTION, StepType.ATTN_MLP, StepType.MLP, StepType.ATTN_MLP, StepType.NO_CACHE]
LABELS = torch.tensor([1, 4, 1])
EVERY_SLOT = [Slot.of(site) for site in range(DEPTH * len(BRANCHES))]

MODEL = tiny_dit(3, depth=DEPTH)
SHAPE = DiTDenoiser(MODEL).shape


def latents(steps: int = len(TIMESTEPS), seed: int = 0) -> Tensor:
    """Random latents for every step: (steps, 3, 4, 8, 8)."""
    return torch.randn(steps, len(LABELS), 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan_of(types: list[StepType], eps_scale: float = 1.0) -> Plan:
    return Plan.from_types(types, TIMESTEPS[: len(types)], layered(DEPTH, BRANCHES), eps_scale)


class Run:
    """One batch's predictions, step by step, for latents from outside."""

    def __init__(self, plan: Plan, labels: Tensor, cfg_scale: float, engine: Engine) -> None:
        guidance = Guidance(cfg_scale)
        batch = Batch(
            guidance.row_labels(engine.denoiser, labels), len(labels), guidance.channels, engine.denoiser.latent_shape
        )
        self._run = engine.forward_run(plan, batch, Tail())
        self._run.guide(cfg_scale)
        self.nbytes = self._run.buffer_set.buffers.nbytes

    def predict(self, i: int, x: Tensor) -> Prediction:
        return split(self._run.predict(i, x), len(x), x.shape[1])


def start(
    plan: Plan, labels: Tensor = LABELS, cfg_scale: float = 1.5, model: DiT = MODEL, engine: Engine | None = None
) -> Run:
    return Run(plan, labels, cfg_scale, engine or Engine(model))


def run(trajectory: Run, xs: Tensor) -> list[Prediction]:
    return [trajectory.predict(i, x) for i, x in enumerate(xs)]


@pytest.mark.parametrize("rows", [2, 10])
@pytest.mark.parametrize("variance", [0, 4])
def test_what_a_sampler_needs_of_an_output(rows: int, variance: int) -> None:
    out = torch.arange(rows * (4 + variance) * 4).view(rows, 4 + variance, 2, 2)
    found = split(out, rows // 2, 4)
    assert torch.equal(found.eps, out[: rows // 2, :4])
    if variance:
        assert found.variance is not None
        assert torch.equal(found.variance, out[: rows // 2, 4:])
    else:
        assert found.variance is None


def assert_bitwise(ours: list[Prediction], theirs: list[Prediction]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, one, other))


# -------------------------------------------------------------------------------------------- steps and caches


def plan_and_reuse(actions: list[list[LayerReuse]]) -> tuple[Plan, list[list[LayerReuse]]]:
    """A plan in which the first step computes everything and the others what ``actions`` say."""
    reuse = [[(False, False)] * DEPTH, *actions]
    action = {False: COMPUTE, True: REUSE}
    steps = (StepPlan.by_layer(BRANCHES, tuple((action[a], action[m]) for a, m in layers)) for layers in reuse)
    return Plan(tuple(steps), TIMESTEPS[: len(reuse)], 0.93), reuse


LAYERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=DEPTH, max_size=DEPTH)


@given(actions=st.lists(LAYERS, max_size=5), cfg_scale=st.sampled_from([0.0, 1.0, 1.5, 4.0]))
@settings(max_examples=40)
def test_every_step_of_any_plan_equals_the_naive_step(actions: list[list[LayerReuse]], cfg_scale: float) -> None:
    plan, reuse = plan_and_reuse(actions)
    xs = latents(len(plan))
    kept = empty_cache(MODEL), empty_cache(MODEL)
    trajectory = start(plan, cfg_scale=cfg_scale)
    for i, (t, x) in enumerate(zip(plan.timesteps, xs, strict=True)):
        eps, variance = trajectory.predict(i, x)
        with torch.no_grad():
            naive_eps, naive_v = naive_predict(MODEL, x, t, LABELS, reuse[i], kept, cfg_scale, 3)
        assert relative_error(eps, 0.93 * naive_eps) <= 1e-12
        assert relative_error(variance, naive_v) <= 1e-12


@torch.no_grad()
def test_a_full_step_equals_the_models_own_forward() -> None:
    x, t = latents(1)[0], torch.full((2 * len(LABELS),), TIMESTEPS[0])
    null = torch.full_like(LABELS, CLASSES)
    out = MODEL.forward_with_cfg(torch.cat([x, x]), t, torch.cat([LABELS, null]), 1.5)[: len(x)]
    eps, variance = start(plan_of([StepType.NO_CACHE])).predict(0, x)
    assert relative_error(torch.cat([eps, variance], dim=1), out) <= 1e-12
    eps, variance = start(plan_of([StepType.NO_CACHE]), cfg_scale=1.0).predict(0, x)
    assert relative_error(torch.cat([eps, variance], dim=1), MODEL(x, t[: len(x)], LABELS)) <= 1e-12


def test_a_step_leaves_its_latents_alone() -> None:
    xs = latents()
    kept = xs.clone()
    run(start(plan_of(TYPES)), xs)
    assert torch.equal(xs, kept)


@pytest.mark.parametrize(
    "types",
    [TYPES, [StepType.NO_CACHE] * 3, [StepType.NO_CACHE, StepType.ATTENTION], [StepType.NO_CACHE, StepType.MLP]],
    ids=["mixed", "none", "attention", "mlp"],
)
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_memory_is_what_the_plan_announced(types: list[StepType], cfg_scale: float) -> None:
    plan, rows = plan_of(types), len(LABELS) * (1 + (cfg_scale != 1.0))
    cache = FeatureCache(SHAPE, plan.memory, rows, torch.float64, torch.device("cpu"))
    assert cache.nbytes == plan.cache_bytes(SHAPE, rows, itemsize=8)
    assert start(plan, cfg_scale=cfg_scale).nbytes > cache.nbytes


@given(live=st.sets(st.sampled_from(EVERY_SLOT)))
def test_only_live_slots_have_memory_of_their_own(live: set[Slot]) -> None:
    cache = FeatureCache(
        SHAPE,
        Memory(live=tuple(sorted(live)), unread=tuple(sorted(set(EVERY_SLOT) - live))),
        2,
        torch.float64,
        torch.device("cpu"),
    )
    addresses = {slot: cache.slot(slot).data_ptr() for slot in EVERY_SLOT}
    shared = {addresses[slot] for slot in EVERY_SLOT if slot not in live}
    assert len({addresses[slot] for slot in live} - shared) == len(live)
    assert len(shared) == (len(live) < len(EVERY_SLOT))
    assert cache.output(1).shape == (2, SHAPE.tokens, SHAPE.width)


def test_every_slot_is_there_in_the_order_of_execution() -> None:
    cache = FeatureCache.full(SHAPE, 1, torch.float64, torch.device("cpu"))
    for k, slot in enumerate(EVERY_SLOT):
        cache.slot(slot).fill_(k)
    assert cache.slots(EVERY_SLOT[0], len(EVERY_SLOT))[:, 0, 0, 0].tolist() == list(range(len(EVERY_SLOT)))


def test_rows_are_copied_where_asked_and_nowhere_else() -> None:
    ours, theirs = (FeatureCache.full(SHAPE, 4, torch.float64, torch.device("cpu")) for _ in range(2))
    for slot in EVERY_SLOT:
        ours.slot(slot).zero_()
        theirs.slot(slot).fill_(1.0)
    ours.copy_rows(theirs, [Slot.of(3)], torch.tensor([True, False, False, True]))
    for slot in EVERY_SLOT:
        copied = [1.0, 0.0, 0.0, 1.0] if slot == Slot.of(3) else [0.0] * 4
        assert ours.slot(slot)[:, 0, 0].tolist() == copied


# -------------------------------------------------------------------------------------- modulation and guidance


@torch.no_grad()
def test_modulation_of_a_row_is_that_of_its_label_and_timestep() -> None:
    table = ModulationTable.of(DiTDenoiser(MODEL), TIMESTEPS, torch.tensor([4, 1, 4, CLASSES]))
    for i, t in enumerate(TIMESTEPS):
        for row, label in enumerate([4, 1, 4, CLASSES]):
            c = MODEL.t_embedder(torch.tensor([t])) + MODEL.y_embedder(torch.tensor([label]))
            here = i, int(table.row_of[row])
            for layer, block in enumerate(MODEL.blocks):
                sites = 2 * layer, 2 * layer + 1
                norms = [table.norm(site, nn.LayerNorm(16)) for site in sites]
                gates = [table.gate((False, site)) for site in sites]
                vectors = [v for norm, gate in zip(norms, gates, strict=True) for v in (norm.shift, norm.scale, gate)]
                ours = torch.cat([vector[here] for vector in vectors])
                assert relative_error(ours, block.adaLN_modulation(c)[0]) <= 1e-12
                assert torch.equal(table.gates((False, 0), 6)[here[0], sites[1], here[1]], vectors[5][here])
            head = table.head_norm(nn.LayerNorm(16))
            ours = torch.cat([head.shift[here], head.scale[here]])
            assert relative_error(ours, MODEL.final_layer.adaLN_modulation(c)[0]) <= 1e-12


@torch.no_grad()
def test_equal_labels_are_stored_once() -> None:
    one, many = (ModulationTable.of(DiTDenoiser(MODEL), TIMESTEPS, torch.tensor(labels)) for labels in ([2], [2] * 9))
    assert one.sites.shape == many.sites.shape
    assert torch.equal(one.sites, many.sites)


@torch.no_grad()
def test_a_row_for_a_timestep_that_is_not_planned() -> None:
    labels = torch.tensor([4, 1])
    whole = ModulationTable.of(DiTDenoiser(MODEL), (*TIMESTEPS[:2], 77), labels)
    table = ModulationTable(DiTDenoiser(MODEL), 3, 3, 2)
    table.load(TIMESTEPS[:2], labels)
    table.load_row(2, 77.0)
    assert relative_error(table.sites[..., :2, :], whole.sites) <= 1e-12
    assert relative_error(table.head[..., :2, :], whole.head) <= 1e-12


def test_guidance_adds_null_rows_only_where_it_is_active() -> None:
    denoiser = DiTDenoiser(MODEL)
    assert Guidance(1.5).row_labels(denoiser, LABELS).tolist() == [1, 4, 1, CLASSES, CLASSES, CLASSES]
    assert Guidance(1.0).row_labels(denoiser, LABELS).tolist() == [1, 4, 1]


def test_guidance_needs_a_null_label() -> None:
    never_dropped = DiTDenoiser(tiny_dit(class_dropout_prob=0.0))
    with pytest.raises(InputError, match=r"cfg_scale=2.0 needs a null label.*use cfg_scale=1"):
        Guidance(2.0).row_labels(never_dropped, LABELS)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), float("-inf")])
def test_guidance_of_no_sense_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match=r"cfg_scale=.* outside \[0, inf\)"):
        Guidance(scale)


def test_guidance_as_operands() -> None:
    guide = Guidance(2.5, 7).guide(DiTDenoiser(MODEL), 0.5, torch.float64)
    assert guide.settings.tolist() == [2.5, 0.5]
    assert (guide.channels, guide.eps_channels, guide.copies) == (4, 4, 2)  # no more than there are
    assert Guidance(1.0).guide(DiTDenoiser(MODEL), 1.0, torch.float64).copies == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_latents_are_kept_in_float32_or_better(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert latent_dtype(DiTDenoiser(tiny_dit(dtype=dtype))) == expected


# --------------------------------------------------------------------------------------------------- trajectory


@pytest.mark.parametrize("order", ["alternating", "nested"])
def test_interleaved_trajectories_equal_isolated_ones_bitwise(order: str) -> None:
    ours, theirs = latents(seed=1), latents(seed=2)[:, :2]
    other_types = [StepType.NO_CACHE, StepType.MLP, StepType.ATTN_MLP, StepType.ATTENTION, *TYPES[4:]]

    def fresh() -> tuple[Run, Run]:
        engine = Engine(MODEL)
        ours = start(plan_of(TYPES, 0.9), engine=engine)
        return ours, start(plan_of(other_types), LABELS[1:], cfg_scale=3.0, engine=engine)

    first, second = fresh()
    isolated = run(first, ours), run(second, theirs)
    first, second = fresh()
    if order == "alternating":
        pairs = [(first.predict(i, ours[i]), second.predict(i, theirs[i])) for i in range(len(TYPES))]
        mixed = [one for one, _ in pairs], [other for _, other in pairs]
    else:
        begun = [first.predict(0, ours[0]), first.predict(1, ours[1])]
        inner = run(second, theirs)
        mixed = begun + [first.predict(i, ours[i]) for i in range(2, len(TYPES))], inner
    assert_bitwise(mixed[0], isolated[0])
    assert_bitwise(mixed[1], isolated[1])


class Cancelled(BaseException):
    """No Exception, as what ends a task or a process is none."""


PARTS: dict[str, Callable[[DiT], torch.nn.Module]] = {
    "embedding": lambda model: model.x_embedder,
    "first attention": lambda model: model.blocks[0].attn.qkv,
    "last MLP": lambda model: model.blocks[-1].mlp.fc1,
    "head": lambda model: model.final_layer.linear,
}


@pytest.mark.parametrize("fatal", range(len(TYPES)))
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_step_that_fails_half_way_can_be_tried_again(part: Callable[[DiT], torch.nn.Module], fatal: int) -> None:
    model, xs = copy.deepcopy(MODEL), latents()
    trajectory = start(plan_of(TYPES), model=model)
    done = [trajectory.predict(i, xs[i]) for i in range(fatal)]

    def fail(*_: object) -> None:
        raise Cancelled

    with part(model).register_forward_pre_hook(fail), suppress(Cancelled):
        done.append(trajectory.predict(fatal, xs[fatal]))
    done += [trajectory.predict(i, xs[i]) for i in range(len(done), len(TYPES))]
    assert_bitwise(done, run(start(plan_of(TYPES), model=model), xs))


def test_what_could_not_be_captured_is_not_tried_again() -> None:
    graphs = FakeGraphs(fail_at=0)
    engine = Engine(MODEL, make_graphs=lambda _: graphs)
    recorded = []
    for _ in range(2):
        trajectory = start(plan_of(TYPES), engine=engine)
        run(trajectory, latents())
        engine.release(trajectory._run.buffer_set)
        recorded.append(graphs.recorded)
    assert recorded[0] > 0
    assert recorded[0] == recorded[1]


def test_idle_graphs_give_way_to_those_of_another_batch() -> None:
    engine = Engine(MODEL, EngineOptions(max_graphs=len(set(TYPES))), make_graphs=lambda _: FakeGraphs())
    for labels in (LABELS, LABELS[:2]):
        trajectory = start(plan_of(TYPES), labels, engine=engine)
        trajectory.predict(0, latents()[0][: len(labels)])
        engine.release(trajectory._run.buffer_set)
    assert engine.stats.replays == 2
    assert engine.stats.graphs == len(set(TYPES))


def test_a_run_of_our_own_loop_that_has_ended_can_not_go_on() -> None:
    plan, noise = plan_of(TYPES), latents()[:1]
    rows = torch.zeros(len(TYPES), 6)
    with Engine(MODEL).sampling(plan, LABELS, Guidance(1.5), rows, noise) as trajectory:
        assert trajectory.advance() == 1
    with pytest.raises(TrajectoryError, match=r"has ended, .*; begin a new run$"):
        trajectory.advance()
