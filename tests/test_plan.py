"""The plan: what it accepts, what it derives, and costs checked against the paper's and against counting."""

import pickle
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebcache_fast.errors import TableError
from ebcache_fast.plan import (
    COMPUTE,
    REUSE,
    Branch,
    ModelShape,
    Plan,
    Rule,
    Site,
    SiteShape,
    Slot,
    StepPlan,
    StepType,
    layered,
    repeated,
)

DIT = (Branch.SELF_ATTN, Branch.MLP)
CROSS_DIT = (Branch.SELF_ATTN, Branch.CROSS_ATTN, Branch.MLP)
C, R = COMPUTE, REUSE
NO_CACHE, ATTENTION, ATTN_MLP, MLP, SELF, CROSS, SELF_MLP, CROSS_MLP = StepType

# Two layers, costs that are powers of ten, so that a sum shows what went into it.
TINY = ModelShape(
    width=5,
    tokens=3,
    site_shapes=repeated(
        2,
        (SiteShape(0, Branch.SELF_ATTN, macs=10, weights=7), SiteShape(0, Branch.MLP, macs=1000, weights=70)),
    ),
    fixed_macs=1,
    fixed_weights=700,
    sizes=(("depth", 2), ("width", 5)),
)


def dit_xl2(tokens: int) -> ModelShape:
    """DiT-XL/2 from its published sizes: 256 tokens at 256 px, 1024 at 512 px."""
    depth, D, N = 28, 1152, tokens
    embedding = N * 16 * D + 256 * D + D * D
    modulation = depth * 6 * D * D + 2 * D * D
    return ModelShape(
        width=D,
        tokens=N,
        site_shapes=repeated(
            depth,
            (
                SiteShape(0, Branch.SELF_ATTN, macs=4 * D * D * N + 2 * N * N * D, weights=4 * D * D + 4 * D),
                SiteShape(0, Branch.MLP, macs=8 * D * D * N, weights=8 * D * D + 5 * D),
            ),
        ),
        fixed_macs=embedding + modulation + N * D * 32,
        fixed_weights=modulation,
        sizes=(),
    )


def plan_of(*step_types: StepType, depth: int = 2, branches: tuple[Branch, ...] = DIT) -> Plan:
    return Plan.from_types(step_types, range(len(step_types) - 1, -1, -1), layered(depth, branches))


def released_types(T: int = 50) -> list[StepType]:
    """The rule behind EB-Cache's released table, step 0 first."""
    types = []
    for i in range(T - 1, -1, -1):
        every = 3 if i > 0.8 * T else 2 if i > 0.4 * T else 1
        full = i == T - 1 or (T - 1 - i) % every == 0 or i < 0.2 * T
        types.append(NO_CACHE if full else ATTN_MLP)
    return types


def fora_types(interval: int, T: int = 50) -> list[StepType]:
    return [NO_CACHE if i == T - 1 or i % interval == 0 else ATTN_MLP for i in range(T - 1, -1, -1)]


# StepPlan


@pytest.mark.parametrize(
    ("step_type", "row"),
    [(NO_CACHE, (C, C, C)), (ATTENTION, (R, R, C)), (ATTN_MLP, (R, R, R)), (MLP, (C, C, R))],
)
def test_uniform_steps(step_type: StepType, row: tuple[Rule, ...]) -> None:
    step = StepPlan.uniform(step_type, layered(2, CROSS_DIT))
    assert step.rules == (*row, *row)
    assert step.step_type is step_type


def test_step_types_keep_the_codes_of_the_released_tables() -> None:
    assert [int(t) for t in (NO_CACHE, ATTENTION, ATTN_MLP, MLP)] == [0, 1, 2, 3]


def test_every_set_of_branches_has_one_step_type() -> None:
    subsets = {frozenset(chosen) for n in range(4) for chosen in combinations(CROSS_DIT, n)}
    assert {step_type.reuses for step_type in StepType} == subsets
    for step_type in StepType:
        step = StepPlan.uniform(step_type, layered(2, CROSS_DIT))
        assert (step.step_type, step.type_name) == (step_type, step_type.name)
        assert {branch for _, branch in step.reused} == step_type.reuses


def test_types_of_one_attention_are_the_first_where_a_model_has_no_other() -> None:
    for finer, usual in ((SELF, ATTENTION), (SELF_MLP, ATTN_MLP)):
        assert StepPlan.uniform(finer, layered(2, DIT)) == StepPlan.uniform(usual, layered(2, DIT))
        assert StepPlan.uniform(finer, layered(2, DIT)).step_type is usual


@pytest.mark.parametrize("step_type", [CROSS, CROSS_MLP])
def test_a_type_of_a_branch_that_layers_lack_is_refused(step_type: StepType) -> None:
    problem = rf"^step type {step_type.name}: expected layers with CROSS_ATTN.*, got layers of SELF_ATTN \+ MLP; use "
    for ask in (lambda: StepPlan.uniform(step_type, layered(2, DIT)), lambda: plan_of(NO_CACHE, step_type)):
        with pytest.raises(TableError, match=problem):
            ask()


def test_mixed_step_lists_its_slots_in_order_of_execution() -> None:
    step = StepPlan.by_layer(DIT, ((C, R), (R, R), (R, C)))
    assert step.computed == ((0, Branch.SELF_ATTN), (2, Branch.MLP))
    assert step.reused == ((0, Branch.MLP), (1, Branch.SELF_ATTN), (1, Branch.MLP), (2, Branch.SELF_ATTN))
    assert step.rule_at(2, Branch.MLP) is C
    assert step.rule_at(2, Branch.SELF_ATTN) is R
    assert step.step_type is None
    assert not step.computes_nothing


def test_only_steps_that_reuse_all_compute_nothing() -> None:
    assert [t for t in StepType if StepPlan.uniform(t, layered(2, CROSS_DIT)).computes_nothing] == [ATTN_MLP]


def test_step_of_a_model_without_attention_is_named_by_what_it_does() -> None:
    assert StepPlan.uniform(ATTENTION, layered(1, (Branch.MLP,))).step_type is NO_CACHE


def test_equal_steps_are_one_key_also_after_their_derived_values_were_read() -> None:
    used, fresh = StepPlan.uniform(ATTENTION, layered(2, DIT)), StepPlan.uniform(ATTENTION, layered(2, DIT))
    assert (used.computed, used.step_type) == (((0, Branch.MLP), (1, Branch.MLP)), ATTENTION)
    assert len({used, fresh, pickle.loads(pickle.dumps(used))}) == 1
    assert StepPlan.uniform(MLP, layered(2, DIT)) != fresh


@pytest.mark.parametrize(
    ("branches", "rows", "problem"),
    [
        ((), ((),), "branches"),
        ((Branch.MLP, Branch.MLP), ((C, C),), "branches"),
        (DIT, (), "rows"),
        (DIT, ((C, C), (C,)), "rows"),
    ],
)
def test_malformed_step_is_refused(
    branches: tuple[Branch, ...], rows: tuple[tuple[Rule, ...], ...], problem: str
) -> None:
    with pytest.raises(TableError, match=f"^{problem}: "):
        StepPlan.by_layer(branches, rows)


# Plan: what it refuses


@pytest.mark.parametrize(
    ("timesteps", "problem"),
    [
        ((), r"timesteps: "),
        ((9, 9), r"timesteps\[1\]: .*9"),
        ((1, 2), r"timesteps\[1\]: "),
        ((1, -1), r"timesteps\[1\]"),
    ],
)
def test_timesteps_decrease_strictly_and_are_not_negative(timesteps: tuple[int, ...], problem: str) -> None:
    with pytest.raises(TableError, match=problem):
        Plan.uncached(timesteps, layered(2, DIT))


@pytest.mark.parametrize("eps_scale", [0.0, -1.0, float("inf"), float("nan")])
def test_eps_scale_is_finite_and_positive(eps_scale: float) -> None:
    with pytest.raises(TableError, match=r"^eps_scale: "):
        Plan.uncached((1, 0), layered(2, DIT), eps_scale)


def test_one_timestep_per_step() -> None:
    with pytest.raises(TableError, match=r"^steps: expected one per timestep, 2, got 1"):
        Plan.from_types([NO_CACHE], (1, 0), layered(2, DIT))


@pytest.mark.parametrize(("depth", "branches"), [(3, DIT), (2, DIT[::-1]), (2, CROSS_DIT)])
def test_all_steps_are_for_one_model(depth: int, branches: tuple[Branch, ...]) -> None:
    steps = (StepPlan.uniform(NO_CACHE, layered(2, DIT)), StepPlan.uniform(NO_CACHE, layered(depth, branches)))
    with pytest.raises(TableError, match=r"^steps\[1\]: expected 2 layers of SELF_ATTN \+ MLP"):
        Plan(steps, (1, 0))


@pytest.mark.parametrize("step_type", [ATTENTION, ATTN_MLP, MLP])
def test_first_step_may_not_reuse(step_type: StepType) -> None:
    with pytest.raises(TableError, match=r"^steps\[0\]: \w+ of layer 0 reads its output, .* NO_CACHE$"):
        plan_of(step_type, NO_CACHE)


def test_one_reused_slot_in_the_first_step_is_enough_to_refuse() -> None:
    with pytest.raises(TableError, match=r"^steps\[0\]: MLP of layer 1 reads"):
        Plan((StepPlan.by_layer(DIT, ((C, C), (C, R))),), (0,))


@pytest.mark.parametrize(("depth", "branches"), [(1, DIT), (3, DIT), (2, DIT[::-1]), (2, CROSS_DIT)])
def test_plan_and_model_must_agree(depth: int, branches: tuple[Branch, ...]) -> None:
    plan = plan_of(NO_CACHE, depth=depth, branches=branches)
    for ask in (
        plan.macs,
        plan.mac_limit,
        lambda s: plan.cache_bytes(s, 1, 4),
        lambda s: plan.bytes_moved(s, 1, 4),
    ):
        with pytest.raises(TableError, match=rf"^shape: expected {depth} layers .* got 2 layers of SELF_ATTN \+ MLP"):
            ask(TINY)


# Plan: what it derives


def test_costs_of_every_step_type_by_hand() -> None:
    plan = plan_of(NO_CACHE, ATTENTION, ATTN_MLP, MLP)
    assert plan.step_macs(TINY) == (2021, 2001, 1, 21)
    assert plan.macs(TINY) == 4044
    assert plan.mac_limit(TINY) == 4 * 2021 / 4044
    # All four slots are live; a slot of 4 rows is 4 * 3 * 5 = 60 elements.
    assert plan.cache_bytes(TINY, rows=4, itemsize=2) == 2 * 4 * 60
    assert plan.bytes_moved(TINY, rows=4, itemsize=2) == (
        2 * (700 + 2 * 77 + 4 * 60),
        2 * (700 + 2 * 70 + 4 * 60),
        2 * (700 + 0 + 4 * 60),
        2 * (700 + 2 * 7 + 4 * 60),
    )


def test_slots_that_nobody_reads_share_scratch_and_need_no_writes() -> None:
    attention = plan_of(NO_CACHE, ATTENTION)
    assert attention.memory.live == (Slot.of(0), Slot.of(2))
    assert attention.cache_bytes(TINY, rows=1, itemsize=1) == (2 + 1) * 15
    assert attention.bytes_moved(TINY, rows=1, itemsize=1) == (700 + 154 + 2 * 15, 700 + 140 + 2 * 15)
    uncached = Plan.uncached((1, 0), layered(2, DIT))
    assert uncached.memory.live == ()
    assert uncached.cache_bytes(TINY, rows=1, itemsize=1) == 15
    assert uncached.bytes_moved(TINY, rows=1, itemsize=1) == (854, 854)


def test_counts_and_runs() -> None:
    mixed = StepPlan.by_layer(DIT, ((C, R), (R, R)))
    types = plan_of(NO_CACHE, NO_CACHE, ATTN_MLP, NO_CACHE)
    plan = Plan((*types.steps, mixed, mixed), (5, 4, 3, 2, 1, 0), eps_scale=0.9)
    assert plan.counts() == {NO_CACHE: 3, ATTN_MLP: 1, None: 2}
    assert plan.runs() == ((0, 2), (2, 1), (3, 1), (4, 2))
    assert (len(plan), plan.sites, plan.eps_scale) == (6, layered(2, DIT), 0.9)


@pytest.mark.parametrize(("tokens", "giga"), [(256, 118.62), (1024, 524.54)])
def test_macs_of_one_step_of_dit_xl2(tokens: int, giga: float) -> None:
    (macs,) = Plan.uncached((0,), layered(28, DIT)).step_macs(dit_xl2(tokens))
    assert round(macs / 1e9, 2) == giga


@pytest.mark.parametrize(("types", "tera"), [(released_types(), 4.04), (fora_types(2), 3.09), (fora_types(4), 1.67)])
def test_macs_of_published_tables(types: list[StepType], tera: float) -> None:
    assert round(plan_of(*types, depth=28).macs(dit_xl2(256)) / 1e12, 2) == tera


def test_the_released_table_caps_the_speedup() -> None:
    plan = plan_of(*released_types(), depth=28)
    assert plan.counts() == {NO_CACHE: 34, ATTN_MLP: 16}
    assert round(plan.mac_limit(dit_xl2(256)), 3) == 1.469


def test_former_forms_keep_working_for_one_release() -> None:
    import ebcache_fast.plan as plans

    with pytest.warns(DeprecationWarning, match="layered"):
        former = Plan.from_types([NO_CACHE, MLP], (1, 0), 2, DIT, 0.9)  # type: ignore[arg-type]
    assert former == Plan.from_types([NO_CACHE, MLP], (1, 0), layered(2, DIT), 0.9)
    with pytest.warns(DeprecationWarning, match="COMPUTE and REUSE"):
        assert plans.Action.REUSE is REUSE
    with pytest.warns(DeprecationWarning, match="rule_at"):
        assert former.steps[1].action(1, Branch.MLP) is REUSE
    assert tuple(cost.branch for cost in TINY.branches) == DIT


# Plan: what holds for all of them


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans for TINY, any action on any slot after the first step."""
    row = st.tuples(st.sampled_from((C, R)), st.sampled_from((C, R)))
    later = draw(st.lists(st.tuples(row, row), max_size=6))
    steps = (StepPlan.uniform(NO_CACHE, layered(2, DIT)), *(StepPlan.by_layer(DIT, rows) for rows in later))
    timesteps = draw(st.sets(st.integers(0, 999), min_size=len(steps), max_size=len(steps)))
    return Plan(steps, tuple(sorted(timesteps, reverse=True)))


@given(plans())
def test_every_read_finds_a_live_slot_that_was_stored(plan: Plan) -> None:
    stored: set[Site] = set()
    read: set[Site] = set()
    for step in plan.steps:
        assert len(step.computed) + len(step.reused) == 4
        assert not set(step.computed) & set(step.reused)
        assert stored.issuperset(step.reused)
        stored.update(step.computed)
        read.update(step.reused)
    assert {plan.sites[slot.first] for slot in plan.memory.live} == read


@given(plans(), st.data())
def test_computing_one_slot_more_never_costs_less(plan: Plan, data: st.DataObject) -> None:
    reads = [(i, slot) for i, step in enumerate(plan.steps) for slot in step.reused]
    if not reads:
        assert plan.mac_limit(TINY) == 1.0
        return
    i, (layer, branch) = data.draw(st.sampled_from(reads))
    rules = list(plan.steps[i].rules)
    rules[plan.sites.index((layer, branch))] = C
    step = StepPlan(plan.sites, tuple(rules))
    dearer = Plan((*plan.steps[:i], step, *plan.steps[i + 1 :]), plan.timesteps)
    assert dearer.macs(TINY) - plan.macs(TINY) == {Branch.SELF_ATTN: 10, Branch.MLP: 1000}[branch]
    assert 1.0 <= dearer.mac_limit(TINY) < plan.mac_limit(TINY)
    assert set(dearer.memory.live) <= set(plan.memory.live)


@given(plans(), st.integers(1, 8), st.sampled_from([2, 4]))
def test_memory_and_traffic_stay_within_bounds(plan: Plan, rows: int, itemsize: int) -> None:
    slot = rows * TINY.slot_elements * itemsize
    assert slot <= plan.cache_bytes(TINY, rows, itemsize) <= 4 * slot
    for moved in plan.bytes_moved(TINY, rows, itemsize):
        assert 700 * itemsize <= moved <= (700 + 2 * 77) * itemsize + 4 * slot


@given(plans())
def test_runs_spell_the_plan_out_again(plan: Plan) -> None:
    runs = plan.runs()
    assert [plan.steps[start] for start, length in runs for _ in range(length)] == list(plan.steps)
    assert all(plan.steps[a] != plan.steps[b] for (a, _), (b, _) in pairwise(runs))


@given(plans())
def test_plans_are_values(plan: Plan) -> None:
    assert plan.memory is plan.memory
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert hash(copy) == hash(plan)


def test_the_first_four_types_fit_layers_of_any_branches() -> None:
    for step_type in (StepType.NO_CACHE, StepType.ATTENTION, StepType.ATTN_MLP, StepType.MLP):
        assert step_type.fits((Branch.SELF_ATTN,))
    assert not StepType.CROSS_ATTENTION.fits((Branch.SELF_ATTN, Branch.MLP))
    assert StepType.CROSS_ATTENTION.fits(tuple(Branch))
