"""`sample` against a naive loop, its promises of equality, and what it refuses."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from constants import BRANCHES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    CLASSES,
    RELATIVE,
    LayerReuse,
    naive_sample,
    naive_solver_timesteps,
    naive_timesteps,
    relative_error,
    tiny_dit,
)
from torch import Tensor, nn

from ebcache_fast.errors import EBCacheError, InputError, TableError
from ebcache_fast.models import DiT
from ebcache_fast.plan import COMPUTE, REUSE, Plan, StepPlan, StepType, layered
from ebcache_fast.plan.table import CacheTable, SamplerSpec
from ebcache_fast.samplers import trajectory_noise
from ebcache_fast.sampling import sample

REUSED: dict[StepType, LayerReuse] = {
    StepType.NO_CACHE: (False, False),
    StepType.ATTENTION: (True, False),
    StepType.ATTN_MLP: (True, True),
    StepType.MLP: (False, True),
}
LABELS = [3, 0, 3, 4, 1]
MIXED = [StepType.NO_CACHE, StepType.ATTENTION, StepType.ATTN_MLP, StepType.MLP, StepType.ATTN_MLP]


@cache
def model(dtype: torch.dtype = torch.float64, learn_sigma: bool = True, patch_size: int = 4) -> DiT:
    return tiny_dit(1, dtype, learn_sigma=learn_sigma, patch_size=patch_size)


def mixed_table(eps_scale: float = 0.97) -> CacheTable:
    return CacheTable(naive_timesteps(len(MIXED)), MIXED, eps_scale)


def plan_of(timesteps: list[int], reuse: list[list[LayerReuse]]) -> Plan:
    """The plan in which every layer of every step has its own say."""
    action = {False: COMPUTE, True: REUSE}
    rows = (tuple((action[attention], action[mlp]) for attention, mlp in layers) for layers in reuse)
    return Plan(tuple(StepPlan.by_layer(BRANCHES, one) for one in rows), tuple(timesteps))


# ------------------------------------------------------------------------------------------- the naive loop


@dataclass(frozen=True)
class Run:
    """A sampling run, for both sides: ``table`` says what ``timesteps`` and ``reuse`` say."""

    table: CacheTable | Plan | None
    timesteps: list[int]
    reuse: list[list[LayerReuse]]
    labels: list[int]
    options: dict[str, float]
    sampler: str
    seed: int
    batch_size: int
    learn_sigma: bool
    patch_size: int


@st.composite
def runs(draw: Callable) -> Run:
    steps = draw(st.integers(1, 6))
    sampler = draw(st.sampled_from(["ddpm", "ddim", "dpm-solver++"]))
    solves = sampler == "dpm-solver++"
    own = naive_solver_timesteps(steps) if solves else naive_timesteps(steps)
    spread = st.sampled_from([own, naive_timesteps(steps)])
    anywhere = st.lists(st.integers(0, 999), min_size=steps, max_size=steps, unique=True)
    # A solver that extrapolates from two neighbours over a long step multiplies what rounding left of them.
    timesteps = draw(spread if solves else spread | anywhere.map(lambda drawn: sorted(drawn, reverse=True)))
    form = draw(st.sampled_from(["none", "table", "plan"]))
    if form == "plan":
        layers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=2)
        reuse = [[(False, False)] * 2, *draw(st.lists(layers, min_size=steps - 1, max_size=steps - 1))]
        table = plan_of(timesteps, reuse)
    else:
        kinds = st.sampled_from(list(REUSED)) if form == "table" else st.just(StepType.NO_CACHE)
        rest = draw(st.lists(kinds, min_size=steps - 1, max_size=steps - 1))
        types = [StepType.NO_CACHE, *rest]
        reuse = [[REUSED[kind]] * 2 for kind in types]
        table = CacheTable(timesteps, types) if form == "table" else None
    return Run(
        table=table,
        timesteps=timesteps if form != "none" else own,
        reuse=reuse,
        labels=draw(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=3)),
        options={
            "cfg_scale": draw(st.sampled_from([0.0, 1.0, 1.5]) | st.floats(0, 6)),
            "guided_channels": draw(st.integers(1, 5)),
            "eps_scale": draw(st.sampled_from([1.0, 0.955, 1.036]) | st.floats(0.5, 1.5)),
        },
        sampler=sampler,
        seed=draw(st.integers(0, 2**64 - 1)),
        batch_size=draw(st.integers(1, 3)),
        learn_sigma=draw(st.booleans()),
        patch_size=draw(st.sampled_from([2, 4])),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@given(run=runs())
@settings(max_examples=40)
def test_cached_sampling_equals_the_naive_loop(dtype: torch.dtype, run: Run) -> None:
    net = model(dtype, run.learn_sigma, run.patch_size)
    ours = sample(
        net,
        run.labels,
        table=run.table,
        steps=len(run.timesteps),
        sampler=run.sampler,
        allow_amplify=True,
        seed=run.seed,
        batch_size=run.batch_size,
        **run.options,
    )
    noise = trajectory_noise(run.seed, range(len(run.labels)), len(run.timesteps), (4, 8, 8), dtype)
    y = torch.tensor(run.labels)
    theirs = naive_sample(net, y, noise, run.timesteps, run.reuse, run.sampler, **run.options)
    assert ours.dtype == dtype
    assert ours.shape == (len(run.labels), 4, 8, 8)
    assert relative_error(ours, theirs) <= RELATIVE[dtype]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_fifty_steps_of_a_table_equal_the_naive_loop(sampler: str) -> None:
    types = [StepType.NO_CACHE, *(StepType(i * i % 4) for i in range(1, 49)), StepType.NO_CACHE]
    timesteps = naive_timesteps(50)
    options = {"cfg_scale": 1.5, "guided_channels": 3, "eps_scale": 0.955}
    spec = SamplerSpec(name=sampler, steps=50, train_steps=1000)
    table = CacheTable(timesteps, types, options["eps_scale"], sampler=spec)
    ours = sample(model(), LABELS[:2], table=table, seed=3)  # all defaults: they are the options above
    noise = trajectory_noise(3, range(2), 50, (4, 8, 8), torch.float64)
    reuse = [[REUSED[kind]] * 2 for kind in types]
    theirs = naive_sample(model(), torch.tensor(LABELS[:2]), noise, timesteps, reuse, sampler, **options)
    assert relative_error(ours, theirs) <= 1e-12


def test_defaults_are_fifty_steps_of_ddpm_guided_by_one_and_a_half() -> None:
    spelled = {"steps": 50, "sampler": "ddpm", "cfg_scale": 1.5, "guided_channels": 3, "eps_scale": 1.0}
    assert torch.equal(sample(model(), [2]), sample(model(), [2], seed=0, **spelled))


# ---------------------------------------------------------------------------------------- promised equality


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_an_all_no_cache_table_equals_no_table_bit_for_bit(dtype: torch.dtype, sampler: str) -> None:
    table = CacheTable(naive_timesteps(7), [StepType.NO_CACHE] * 7, eps_scale=1.0)
    with_table = sample(model(dtype), LABELS, table=table, sampler=sampler)
    assert torch.equal(with_table, sample(model(dtype), LABELS, steps=7, sampler=sampler))


def test_the_same_call_twice_is_bitwise_equal() -> None:
    first, second = (sample(model(), LABELS, table=mixed_table(), seed=5) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample(model(), LABELS, table=mixed_table(), seed=6))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_sample_does_not_depend_on_its_batch(batch_size: int) -> None:
    whole = sample(model(), LABELS, table=mixed_table())
    assert relative_error(sample(model(), LABELS, table=mixed_table(), batch_size=batch_size), whole) <= 1e-12


def test_first_index_continues_a_run() -> None:
    whole = sample(model(), LABELS, table=mixed_table(), seed=2)
    rest = sample(model(), LABELS[2:], table=mixed_table(), seed=2, first_index=2)
    assert relative_error(rest, whole[2:]) <= 1e-12
    assert relative_error(rest[:1], whole[:1]) > 0.01  # the same label, but another index


def test_labels_may_be_a_tensor_of_any_integers() -> None:
    expected = sample(model(), LABELS, steps=2)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(sample(model(), torch.tensor(LABELS, dtype=dtype), steps=2), expected)


def test_scale_of_table_and_argument_are_the_same_thing_and_the_argument_wins() -> None:
    expected = sample(model(), LABELS, table=mixed_table(0.9))
    assert torch.equal(sample(model(), LABELS, table=mixed_table(0.97), eps_scale=0.9), expected)


def test_a_table_that_amplifies_needs_no_second_permission() -> None:
    timesteps = naive_timesteps(5)
    table = CacheTable(timesteps, MIXED, 1.1, allow_amplify=True)
    expected = sample(model(), LABELS, table=mixed_table(), eps_scale=1.1, allow_amplify=True)
    assert torch.equal(sample(model(), LABELS, table=table), expected)


def test_no_gradient_is_kept() -> None:
    assert not sample(model(), [0], table=mixed_table()).requires_grad


def test_train_mode_drops_no_label() -> None:
    training = copy.deepcopy(model()).train()
    assert torch.equal(sample(training, LABELS, steps=3), sample(model(), LABELS, steps=3))


# --------------------------------------------------------------------------------- interruption and mutation


def test_on_step_hears_of_every_step_of_every_batch() -> None:
    heard: list[int] = []
    sample(model(), LABELS, table=mixed_table(), batch_size=2, on_step=heard.append)
    assert heard == [2] * 5 + [2] * 5 + [1] * 5


@pytest.mark.parametrize("fatal", range(10))
def test_an_exception_at_any_step_leaves_nothing_behind(fatal: int) -> None:
    def interrupt(_: int) -> None:
        calls.append(1)
        if len(calls) > fatal:
            raise KeyboardInterrupt

    calls: list[int] = []
    expected = sample(copy.deepcopy(model()), LABELS, table=mixed_table(), batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        sample(model(), LABELS, table=mixed_table(), batch_size=3, on_step=interrupt)
    assert torch.equal(sample(model(), LABELS, table=mixed_table(), batch_size=3), expected)


def load_others(net: nn.Module, assign: bool) -> None:
    net.load_state_dict(tiny_dit(9).state_dict(), assign=assign)


def replace_layer(net: DiT) -> None:
    net.blocks[1].mlp.fc2 = tiny_dit(9).blocks[1].mlp.fc2


def assign_data(net: DiT) -> None:
    net.blocks[0].attn.proj.weight.data = tiny_dit(9).blocks[0].attn.proj.weight.data


def narrow(net: DiT) -> None:
    net.bfloat16().double()


MUTATIONS: dict[str, Callable[[DiT], object]] = {
    "load_state_dict": lambda net: load_others(net, assign=False),
    "load_state_dict_assign": lambda net: load_others(net, assign=True),
    "replace_layer": replace_layer,
    "assign_data": assign_data,
    "narrow": narrow,
} | {
    name: lambda net, name=name: net.get_parameter(name).data.mul_(1.5)
    for name in (
        "pos_embed",
        "x_embedder.proj.weight",
        "t_embedder.mlp.2.weight",
        "y_embedder.embedding_table.weight",
        "blocks.0.attn.qkv.bias",
        "blocks.1.attn.proj.weight",
        "blocks.0.mlp.fc2.bias",
        "blocks.1.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.bias",
    )
}


@pytest.mark.parametrize("change", MUTATIONS.values(), ids=MUTATIONS)
def test_weights_changed_between_runs_are_seen(change: Callable[[DiT], object]) -> None:
    net = tiny_dit(2)
    before = sample(net, LABELS[:2], table=mixed_table())
    change(net)
    after = sample(net, LABELS[:2], table=mixed_table())
    assert torch.equal(after, sample(copy.deepcopy(net), LABELS[:2], table=mixed_table()))
    assert not torch.equal(after, before)


# ---------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_half_precision_models_give_float32_latents(dtype: torch.dtype, near: float, sampler: str) -> None:
    narrow = tiny_dit(1, dtype)
    wide = copy.deepcopy(narrow).float()  # the same rounded weights
    ours = sample(narrow, LABELS, table=mixed_table(), sampler=sampler)
    theirs = sample(wide, LABELS, table=mixed_table(), sampler=sampler)
    assert ours.dtype == torch.float32
    assert 0 < relative_error(ours, theirs) <= near


# --------------------------------------------------------------------------------------------------- refusals


def table_with(sampler: str | None = None, **changes: object) -> CacheTable:
    timesteps = naive_timesteps(5)
    spec = SamplerSpec(name=sampler, steps=5, train_steps=1000) if sampler else None
    return CacheTable(timesteps, MIXED, sampler=spec, **changes)


REFUSED: dict[str, tuple[dict[str, object], type[EBCacheError], str]] = (
    {
        "label too large": ({"labels": [0, 5]}, InputError, r"label 5 is outside \[0, 4\]"),
        "label too large for its dtype": ({"labels": torch.tensor([200], dtype=torch.uint8)}, InputError, "label 200"),
        "label negative": ({"labels": [-1]}, InputError, "label -1"),
        "label beyond 64 bits": ({"labels": [2**70]}, InputError, "not a row of integers"),
        "labels empty": ({"labels": []}, InputError, "at least one"),
        "labels fractional": ({"labels": [0.5]}, InputError, "float32"),
        "labels whole but floating": ({"labels": torch.tensor([1.0])}, InputError, "float32"),
        "labels bool": ({"labels": [True, False]}, InputError, "bool"),
        "labels complex": ({"labels": torch.tensor([1j])}, InputError, "complex"),
        "labels words": ({"labels": ["A"]}, InputError, "not a row of integers"),
        "labels None": ({"labels": None}, InputError, "not a row of integers"),
        "labels a number": ({"labels": 3}, InputError, "not a row of integers"),
        "labels two rows": ({"labels": [[0], [1]]}, InputError, "not a row of integers"),
        "labels ragged": ({"labels": [[0], [1, 2]]}, InputError, "not a row of integers"),
        "table for other steps": ({"table": table_with(), "steps": 50}, TableError, "steps=50.* 5 steps"),
        "table for another model": ({"table": table_with(model={"depth": 28})}, TableError, "depth 28, not 2"),
        "table for another sampler": ({"table": table_with("ddim"), "sampler": "ddpm"}, TableError, "'ddim'"),
        "table of an unknown sampler": ({"table": table_with("euler")}, InputError, "'euler' is unknown"),
        "table of an endless schedule": (
            {"table": CacheTable([5, 0], [0, 0], sampler=SamplerSpec(name="ddpm", steps=2, train_steps=2**62))},
            TableError,
            "train_steps=4611686018427387904 is above 100000",
        ),
        "table beyond the schedule": (
            {"table": CacheTable([1000, 0], [0, 0])},
            InputError,
            r"timestep 1000 is outside \[0, 999\]",
        ),
        "plan for another model": (
            {"table": Plan.uncached((999, 0), layered(3, BRANCHES))},
            TableError,
            "expected 3 layers.*got 2 layers",
        ),
        "unknown sampler": ({"sampler": "euler"}, InputError, "ddpm, ddim"),
        "no steps": ({"steps": 0}, InputError, r"\[1, 1000\]"),
        "too many steps": ({"steps": 1001}, InputError, r"\[1, 1000\]"),
        "batch_size zero": ({"batch_size": 0}, InputError, "batch_size=0"),
        "seed negative": ({"seed": -1}, InputError, "seed=-1"),
        "first_index negative": ({"first_index": -1}, InputError, "sample index=-1"),
        "no guided channel": ({"guided_channels": 0}, InputError, "below 1"),
    }
    | {
        f"eps_scale {b}{' though amplification is allowed' * allowed}": (
            {"eps_scale": b, "allow_amplify": allowed},
            InputError,
            "eps_scale=.*allow_amplify",
        )
        for b, allowed in [
            (0.0, False),
            (-0.5, False),
            (1.0001, False),
            (math.nan, False),
            (math.inf, False),
            (0.0, True),
            (-0.5, True),
            (math.nan, True),
            (math.inf, True),
        ]
    }
    | {
        f"cfg_scale {scale}": ({"cfg_scale": scale}, InputError, r"cfg_scale=.*\[0, inf\)")
        for scale in (-1.0, math.nan, math.inf, -math.inf)
    }
)


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_typed_line(arguments: dict, error: type[EBCacheError], message: str) -> None:
    steps = [] if "table" in arguments else [("steps", 5)]
    with pytest.raises(EBCacheError, match=message) as caught:
        sample(model(), **(dict(steps) | {"labels": LABELS} | arguments))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_guidance_needs_a_null_label() -> None:
    never_dropped = tiny_dit(class_dropout_prob=0.0)
    with pytest.raises(InputError, match="null label") as caught:
        sample(never_dropped, LABELS, steps=2)
    assert "\n" not in str(caught.value)
    assert sample(never_dropped, LABELS, steps=2, cfg_scale=1.0).shape == (5, 4, 8, 8)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"Linear is of no known family.*DiT"):
        sample(nn.Linear(2, 2), LABELS)


def test_a_run_of_one_sample_keeps_the_shape() -> None:
    latents: Tensor = sample(model(torch.float32), [4], steps=1)
    assert latents.shape == (1, 4, 8, 8)
    assert bool(latents.isfinite().all())
