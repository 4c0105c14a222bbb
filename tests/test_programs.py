"""Programs: what a step launches, for any plan of any sites; without torch, in milliseconds."""

import pickle
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ebcache_fast.errors import TableError
from ebcache_fast.plan import (
    COMPUTE,
    REUSE,
    Branch,
    Compute,
    Forecast,
    FullAndWindow,
    KeepSpan,
    Memory,
    Plan,
    Program,
    Rule,
    SharedByGuidance,
    Site,
    SiteShape,
    SkipSpan,
    Slot,
    StepPlan,
    StepType,
    Term,
    Tokens,
    Window,
    layered,
    lower,
    verify,
)
from ebcache_fast.plan import program as names
from ebcache_fast.plan.lowering import bare

XL = layered(28, (Branch.SELF_ATTN, Branch.MLP))
EVERY_RULE: list[Rule] = [COMPUTE, REUSE]
INPUTS = (names.EMBED_NORM, names.RESIDUAL_NORM, names.RESIDUAL_QUANTISE)


@st.composite
def models(draw: st.DrawFn, *, parallel: bool = True) -> tuple[SiteShape, ...]:
    """Sites of any kind, a branch a layer once; costs are powers of two, so that a sum shows what went into it."""
    found: list[SiteShape] = []
    for layer in range(draw(st.integers(1, 5))):
        for branch in draw(st.lists(st.sampled_from(Branch), min_size=1, max_size=3, unique=True)):
            is_parallel = parallel and bool(found) and draw(st.booleans())
            is_normed = found[-1].is_normed if is_parallel else draw(st.booleans())
            macs = 2 ** len(found)
            found.append(SiteShape(layer, branch, macs, macs, is_parallel=is_parallel, is_normed=is_normed))
    return tuple(found)


@st.composite
def plans(draw: st.DrawFn, shapes: tuple[SiteShape, ...]) -> Plan:
    """Any rule at any site after a first step that computes everything."""
    sites = tuple(shape.site for shape in shapes)
    rows = draw(st.lists(st.tuples(*[st.sampled_from(EVERY_RULE)] * len(sites)), max_size=5))
    steps = (StepPlan.uniform(StepType.NO_CACHE, sites), *(StepPlan(sites, tuple(row)) for row in rows))
    return Plan(steps, tuple(range(len(steps)))[::-1])


@st.composite
def lowered(draw: st.DrawFn, *, parallel: bool = True) -> tuple[tuple[SiteShape, ...], Plan, bool, list[Program]]:
    """Sites, a plan, whether our own loop runs it, and the programs of its steps."""
    shapes = draw(models(parallel=parallel))
    plan, samples = draw(plans(shapes)), draw(st.booleans())
    float8 = frozenset(draw(st.sets(st.sampled_from([i for i, one in enumerate(shapes) if one.is_normed] or [-1]))))
    return (
        shapes,
        plan,
        samples,
        [lower(step, shapes, plan.memory, samples=samples, float8=float8) for step in plan.steps],
    )


def launches_one_by_one(shapes: tuple[SiteShape, ...], step: StepPlan, *, samples: bool) -> int:
    """How many launches a step costs where no sum is made of a part of it: terms go two by two."""
    if step.computes_nothing:
        return 2 if samples else 3
    count, pending, is_embedded = 0, 0, False
    for shape, rule in zip(shapes, step.rules, strict=True):
        if rule is COMPUTE:
            flushed = max(0, -(-(pending - 2) // 2))
            if shape.is_normed:
                count += flushed + (not is_embedded and pending > 0) + 1
            else:
                count += flushed + (not is_embedded) + (pending > 0)
            count, is_embedded, pending = count + 1, True, 0
        pending += 1
    return count + max(0, -(-(pending - 2) // 2)) + 1


@given(lowered())
def test_what_holds_for_every_program(
    case: tuple[tuple[SiteShape, ...], Plan, bool, list[Program]],
) -> None:
    shapes, plan, samples, programs = case
    verify(programs)
    for step, program in zip(plan.steps, programs, strict=True):
        computed = [i for i, rule in enumerate(step.rules) if rule is COMPUTE]
        assert list(program.branches) == computed
        assert {slot.first for slot in program.writes} == set(computed)
        terms = [term for launch in program for term in launch.terms]
        assert sorted(terms) == [Term(Slot.of(i), i) for i in range(len(shapes))]  # each once, with its own gate
        assert program.launches[-1].name == (names.RUN if samples and not computed else names.HEAD)
        reading = [launch.name for launch in program if launch.name not in names.WITHOUT_STEP]
        assert len(reading) > 1  # the first takes the step over, the last hands it on
        begins = [launch.name in (names.EMBED, names.EMBED_NORM, names.SUMS) for launch in program]
        assert begins == [True] + [False] * (len(program) - 1)
        inputs = [launch.site for launch in program if launch.name in INPUTS]
        groups = {max(j for j in range(i + 1) if not shapes[j].is_parallel) for i in computed if shapes[i].is_normed}
        assert len(inputs) == len(groups)  # sites in parallel share theirs
        for launch in program:
            assert len(launch.terms) <= 2 or launch.name in (names.SUM, names.SUMS)
            if len(launch.terms) > 2:
                assert all(plan.memory.are_neighbours(*pair) for pair in pairwise(launch.terms))


@given(lowered())
def test_an_input_is_the_stream_of_all_that_comes_before(
    case: tuple[tuple[SiteShape, ...], Plan, bool, list[Program]],
) -> None:
    """Sites in parallel take the one input, made before any of them is added."""
    shapes, _, _, programs = case
    for program in programs:
        added: list[int] = []
        inputs: dict[int, list[int]] = {}
        for launch in program:
            added += [term.slot.first for term in launch.terms]
            if launch.name == names.BRANCH:
                inputs[launch.site] = list(added)
        for site, before in inputs.items():
            first = max(i for i in range(site + 1) if not shapes[i].is_parallel)
            assert sorted(before) == list(range(first))


@given(lowered(parallel=False))
def test_never_more_launches_than_two_by_two(
    case: tuple[tuple[SiteShape, ...], Plan, bool, list[Program]],
) -> None:
    shapes, plan, samples, _ = case
    assume(shapes[0].is_normed)  # else the step of a model without a norm at all would be taken over by its head
    for step in plan.steps:
        program = lower(step, shapes, plan.memory, samples=samples)
        assert len(program) <= launches_one_by_one(shapes, step, samples=samples)


@given(lowered())
def test_costs_are_what_the_branches_cost(
    case: tuple[tuple[SiteShape, ...], Plan, bool, list[Program]],
) -> None:
    from ebcache_fast.plan import ModelShape

    shapes, plan, _, programs = case
    shape = ModelShape(3, 5, shapes, fixed_macs=2**20, fixed_weights=2**20, sizes=())
    computed = [[i for i, rule in enumerate(step.rules) if rule is COMPUTE] for step in plan.steps]
    assert list(plan.step_macs(shape)) == [2**20 + sum(shapes[i].macs for i in each) for each in computed]
    for program, moved in zip(programs, plan.bytes_moved(shape, 2, 4), strict=True):
        written = sum(slot in plan.memory.live for slot in program.writes)
        weights = 2**20 + sum(shapes[site].weights for site in program.branches)
        assert moved == 4 * (weights + 2 * 15 * (written + len(program.reads)))


def program_of(step: StepPlan, *before: StepPlan, samples: bool = True, steps: int = 1) -> Program:
    """The program of a step on sites of the usual kind, of a plan of it and a full step."""
    full = StepPlan.uniform(StepType.NO_CACHE, step.sites)
    plan = Plan((full, *before, step), tuple(range(2 + len(before)))[::-1])
    shapes = [SiteShape(site.layer, site.branch, 1, 1) for site in step.sites]
    return lower(step, shapes, plan.memory, samples=samples, steps=steps)


def masked(computed: set[int]) -> StepPlan:
    """A step of DiT-XL/2 that computes both branches of these layers."""
    return StepPlan(XL, tuple(COMPUTE if site.layer in computed else REUSE for site in XL))


@pytest.mark.parametrize(
    ("step", "launches"),
    [
        (StepPlan.uniform(StepType.NO_CACHE, XL), 57),
        (StepPlan.uniform(StepType.ATTENTION, XL), 30),
        (StepPlan.uniform(StepType.MLP, XL), 29),
        (StepPlan.uniform(StepType.ATTN_MLP, XL), 2),
        (masked({0, 27}), 6),
        (masked(set(range(0, 28, 4))), 22),
    ],
    ids=["NO_CACHE", "ATTENTION", "MLP", "ATTN_MLP", "the first and the last layer", "every fourth layer"],
)
def test_launches_of_dit_xl_2_besides_its_branches(step: StepPlan, launches: int) -> None:
    program = program_of(step)
    assert len(program) - len(program.branches) == launches


def test_neighbours_of_slots_that_nobody_reads_are_none() -> None:
    """Where a site is computed at every step, what is added at once ends, and what is left goes with the next input."""
    rules = (REUSE, COMPUTE, REUSE, REUSE, REUSE, COMPUTE)
    step = StepPlan(layered(3, (Branch.SELF_ATTN, Branch.MLP)), rules)
    added = [(launch.name, [term.slot.first for term in launch.terms]) for launch in program_of(step) if launch.terms]
    assert added == [(names.RESIDUAL_NORM, [0]), (names.SUM, [2, 3, 4]), (names.RESIDUAL_NORM, [1]), (names.HEAD, [5])]


def test_what_nobody_reads_shares_scratch_but_for_what_waits_at_the_same_time() -> None:
    shapes = [SiteShape(i, Branch.MLP, 1, 1, is_parallel=i in (1, 2, 5)) for i in range(6)]
    outputs, rest = [Slot.of(i) for i in range(6)], Slot.of(3, meaning=f"{names.REST} 5")
    found = Memory(live=(outputs[1],), unread=(*outputs[:1], *outputs[2:], rest)).scratches(shapes)
    assert found == {outputs[0]: 0, outputs[2]: 2, outputs[3]: 0, outputs[4]: 0, outputs[5]: 1, rest: 3}


def test_tokens_are_taken_from_an_input_that_is_not_quantised() -> None:
    sites = layered(1, (Branch.SELF_ATTN, Branch.MLP))
    shapes = [SiteShape(site.layer, site.branch, 1, 1) for site in sites]
    step = StepPlan(sites, (REUSE, Tokens(2)))
    plan = Plan((StepPlan.uniform(StepType.NO_CACHE, sites), step), (1, 0))
    quantised, plain = (
        [launch.name for launch in lower(each, shapes, plan.memory, samples=True, float8=frozenset({0, 1}))]
        for each in plan.steps
    )
    assert quantised.count(names.RESIDUAL_QUANTISE) == 2
    assert names.RESIDUAL_NORM in plain
    assert names.RESIDUAL_QUANTISE not in plain


def test_what_one_launch_can_not_sum_is_no_run() -> None:
    sites = layered(2, (Branch.SELF_ATTN, Branch.MLP))
    kept = StepPlan(sites, (COMPUTE,) * 4, (KeepSpan(0, 1),))
    step = StepPlan(sites, (REUSE,) * 4, (SkipSpan(0, 1),))
    plan = Plan((kept, step), (1, 0))
    shapes = [SiteShape(site.layer, site.branch, 1, 1) for site in sites]
    program = lower(step, shapes, plan.memory, samples=True)
    assert [launch.name for launch in program] == [names.EMBED, names.RESIDUAL, names.HEAD]
    assert not plan.collapsing


def test_a_program_can_be_read() -> None:
    assert str(program_of(StepPlan.uniform(StepType.NO_CACHE, XL))).splitlines() == [
        "embed_norm          0.self_attn",
        "branch              0.self_attn",
        "residual_norm       0.mlp  + 0.self_attn",
        "branch              0.mlp",
        "residual_norm       i.self_attn  + i-1.mlp",
        "branch              i.self_attn",
        "residual_norm       i.mlp  + i.self_attn",
        "branch              i.mlp",
        "    for i = 1 to 27",
        "head                + 27.mlp",
    ]
    assert str(program_of(StepPlan.uniform(StepType.ATTN_MLP, XL), steps=3)).splitlines() == [
        "sums                + 0.self_attn .. 27.mlp (56)  x 3",
        "run                 x 3",
    ]
    assert "sum                 + 1.self_attn .. 26.mlp (52)" in str(program_of(masked({0, 27})))


def test_long_sums_are_read_from_end_to_end() -> None:
    """And short ones summand by summand."""
    branches = (Branch.SELF_ATTN, Branch.CROSS_ATTN, Branch.MLP)
    for depth, line in ((1, "+ 0.self_attn + 0.cross_attn + 0.mlp"), (2, "+ 0.self_attn .. 1.mlp (6)")):
        sites = layered(depth, branches)
        assert sum_of(sites) == f"sums                {line}  x 2"
    assert sum_of(layered(2, (Branch.SELF_ATTN, Branch.MLP))) == "sums                + 0.self_attn .. 1.mlp (4)  x 2"


def sum_of(sites: tuple[Site, ...]) -> str:
    plan = Plan(tuple(StepPlan(sites, (rule,) * len(sites)) for rule in (COMPUTE, REUSE)), (1, 0))
    program = lower(plan.steps[1], bare(sites), plan.memory, samples=True, steps=2)
    return str(program).splitlines()[0]


def test_two_layers_that_are_alike_stand_once() -> None:
    sites = layered(4, (Branch.SELF_ATTN, Branch.MLP))
    computed = StepPlan(sites, (COMPUTE,) * 6 + (REUSE,) * 2)
    lines = str(lower(computed, [SiteShape(site.layer, site.branch, 1, 1) for site in sites], Memory(), samples=True))
    assert "    for i = 1 to 2\nresidual            + 2.mlp + 3.self_attn\n" in lines


def test_every_kind_of_launch_can_be_read() -> None:
    sites = layered(3, (Branch.SELF_ATTN, Branch.MLP))
    kept = StepPlan(sites, (FullAndWindow(7), COMPUTE, Compute(1), COMPUTE, COMPUTE, COMPUTE), (KeepSpan(4, 5),))
    step = StepPlan(sites, (Window(7), Tokens(3), Forecast(1), SharedByGuidance(), REUSE, REUSE), (SkipSpan(4, 5),))
    shapes = [SiteShape(site.layer, site.branch, 1, 1) for site in sites]
    plan = Plan((StepPlan.uniform(StepType.NO_CACHE, sites), kept, step), (2, 1, 0))
    first, second = (str(lower(each, shapes, plan.memory, samples=True)).splitlines() for each in plan.steps[1:])
    assert first == [
        "embed_norm          0.self_attn",
        "branch              0.self_attn",
        "branch              0.self_attn  window 7  -> 0.self_attn window",
        "subtract            of 0.self_attn less 0.self_attn window  -> 0.self_attn rest 7",
        "residual_norm       0.mlp  + 0.self_attn",
        "branch              0.mlp",
        "residual_norm       1.self_attn  + 0.mlp",
        "branch              1.self_attn  -> 1.self_attn [1]",
        "residual_norm       1.mlp  + 1.self_attn [1]",
        "branch              1.mlp",
        "residual            + 1.mlp",
        "copy                of the stream  -> 2.self_attn..2.mlp mark",
        "residual_norm       2.self_attn",
        "branch              2.self_attn",
        "residual_norm       2.mlp  + 2.self_attn",
        "branch              2.mlp",
        "residual            + 2.mlp",
        "subtract            of the stream less 2.self_attn..2.mlp mark  -> 2.self_attn..2.mlp change",
        "head",
    ]
    assert second == [
        "embed_norm          0.self_attn",
        "branch              0.self_attn  window 7  -> 0.self_attn window",
        "residual_norm       0.mlp  + 0.self_attn window + 0.self_attn rest 7",
        "select              0.mlp  of 0.mlp  tokens 3",
        "gather              0.mlp  tokens 3",
        "branch              0.mlp  tokens 3",
        "scatter             0.mlp  of 0.mlp  tokens 3",
        "residual            + 0.mlp + taylor 1.self_attn",
        "residual_norm       1.mlp  + taylor 1.self_attn [1]",
        "branch              1.mlp  for both",
        "head                + 1.mlp + 2.self_attn..2.mlp change",
    ]


def test_a_program_is_a_key() -> None:
    one, other = (program_of(StepPlan.uniform(StepType.ATTENTION, XL)) for _ in range(2))
    assert len({one, other, pickle.loads(pickle.dumps(one))}) == 1
    assert one != program_of(StepPlan.uniform(StepType.MLP, XL))
    assert program_of(StepPlan.uniform(StepType.ATTN_MLP, XL), steps=2) != program_of(
        StepPlan.uniform(StepType.ATTN_MLP, XL)
    )


def test_what_no_step_stored_is_named() -> None:
    sites = layered(2, (Branch.SELF_ATTN, Branch.MLP))
    shapes = [SiteShape(site.layer, site.branch, 1, 1) for site in sites]
    rows = (COMPUTE, COMPUTE, COMPUTE, REUSE), (REUSE, REUSE, REUSE, REUSE)
    programs = [lower(StepPlan(sites, row), shapes, Memory(), samples=False) for row in rows]
    with pytest.raises(TableError, match=r"^steps\[0\]: MLP of layer 1 reads its output, which .*NO_CACHE$"):
        verify(programs)


def test_rules_and_sites_are_as_many() -> None:
    for sites, rules, problem in (((), (), "sites"), (XL[:1] * 2, (REUSE,) * 2, "sites"), (XL, (REUSE,), "rules")):
        with pytest.raises(TableError, match=f"^{problem}: expected one"):
            StepPlan(sites, rules)
