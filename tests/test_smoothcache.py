"""SmoothCache's schedules: what each form of the file means, on models with one attention and with two."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebcache_fast import enable, stats
from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, REUSE, Branch, ModelShape, Plan, SiteShape, StepPlan, StepType, layered, repeated
from ebcache_fast.plan.importers import from_smoothcache, smoothcache_plan
from ebcache_fast.plan.table import CacheTable, Provenance

NO_CACHE, ATTENTION, ATTN_MLP, MLP, SELF, CROSS, SELF_MLP, CROSS_MLP = StepType
C, R = COMPUTE, REUSE
T4 = (30, 20, 10, 0)
DIT = (Branch.SELF_ATTN, Branch.MLP)
TWO = (Branch.SELF_ATTN, Branch.CROSS_ATTN, Branch.MLP)


def shape_of(*branches: Branch) -> ModelShape:
    return ModelShape(8, 4, repeated(2, (SiteShape(0, branch, 10, 10) for branch in branches)), 1, 1, ())


def smooth(path: Path, **rows: object) -> Path:
    path.write_text(json.dumps({name.replace("_", "-"): row for name, row in rows.items()}))
    return path


# A table, where layers are treated alike


@pytest.mark.parametrize(
    ("rows", "step_types"),
    [
        ({"attn": [1, 0, 0, 1], "mlp": [1, 1, 0, 0]}, (NO_CACHE, SELF, SELF_MLP, MLP)),
        ({"attn1": [1, 0, 1, 0]}, (NO_CACHE, SELF, NO_CACHE, SELF)),
        ({"attn2": [1, 0, 1, 0]}, (NO_CACHE, CROSS, NO_CACHE, CROSS)),
        ({"ff": [1, 0, 1, 0]}, (NO_CACHE, MLP, NO_CACHE, MLP)),
        ({"attn1": [1, 0, 1, 0], "ff": [1, 0, 0, 1]}, (NO_CACHE, SELF_MLP, MLP, SELF)),
        ({"attn2": [1, 0, 1, 0], "ff": [1, 0, 0, 1]}, (NO_CACHE, CROSS_MLP, MLP, CROSS)),
        ({"attn1": [1, 0, 0, 1], "attn2": [1, 0, 1, 0]}, (NO_CACHE, ATTENTION, SELF, CROSS)),
        ({"attn1": [1, 0, 0, 1], "attn2": [1, 0, 0, 1], "ff": [1, 1, 0, 0]}, (NO_CACHE, ATTENTION, ATTN_MLP, MLP)),
        ({"attn": [0, 0, 1, 0], "mlp": [0, 1, 0, 0]}, (NO_CACHE, SELF, MLP, SELF_MLP)),  # at first all is computed
    ],
)
def test_a_branch_without_a_list_is_computed_on_every_model(
    rows: dict[str, list[int]], step_types: tuple[StepType, ...], tmp_path: Path
) -> None:
    path = smooth(tmp_path / "s.json", **rows)
    table = from_smoothcache(path, T4, eps_scale=0.9)
    assert table.step_types == step_types
    assert (table.timesteps, table.eps_scale) == (T4, 0.9)
    assert table.plan(shape_of(*TWO)) == smoothcache_plan(path, T4, 2, 0.9, TWO)
    table.save(tmp_path / "ours.json")
    assert CacheTable.load(tmp_path / "ours.json") == table


def test_a_model_with_one_attention_has_the_plan_it_had(tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", attn=[1, 0, 0, 1], mlp=[1, 0, 1, 0])
    plan = from_smoothcache(path, T4).plan(shape_of(*DIT))
    assert plan == smoothcache_plan(path, T4, depth=2)
    assert [step.step_type for step in plan.steps] == [NO_CACHE, ATTN_MLP, ATTENTION, MLP]


def test_an_import_says_which_lists_there_were(tmp_path: Path) -> None:
    made = from_smoothcache(smooth(tmp_path / "s.json", ff=[1, 1], attn1=[1, 1]), (1, 0)).made
    assert made is not None
    assert (made.source, made.options) == ("s.json", {"lists": "SELF_ATTN + MLP"})


@pytest.mark.parametrize(
    "rows", [{"attn2": [1, 0]}, {"attn1": [1, 0], "attn2": [1, 0]}, {"attn2": [1, 1]}, {"attn2": [1, 0], "ff": [1, 0]}]
)
def test_a_schedule_with_a_list_for_cross_attention_is_for_models_that_have_it(
    rows: dict[str, list[int]], tmp_path: Path
) -> None:
    path = smooth(tmp_path / "s.json", **rows)
    table = from_smoothcache(path, (1, 0))
    dit = shape_of(*DIT)
    for ask in (lambda: table.plan(dit), lambda: table.check(dit, (1, 0)), lambda: smoothcache_plan(path, (1, 0), 2)):
        with pytest.raises(TableError, match=r"CROSS_ATTN.* SELF_ATTN \+ MLP"):
            ask()
    table.plan(shape_of(*TWO))


@pytest.mark.parametrize("reusing", [ATTENTION, ATTN_MLP])
def test_an_import_of_the_first_version_is_refused_where_it_could_be_wrong(reusing: StepType) -> None:
    made = Provenance(by="SmoothCache (arXiv 2411.10510)", source="old.json")
    old = CacheTable((1, 0), (NO_CACHE, reusing), made=made)
    assert old.plan(shape_of(*DIT)).steps[1].step_type is reusing
    with pytest.raises(TableError, match=r"^made: SmoothCache .*old\.json.*; import the schedule again$"):
        old.plan(shape_of(*TWO))
    for table in (replace(old, step_types=(NO_CACHE, MLP)), replace(old, made=None)):
        table.plan(shape_of(*TWO))


def test_lists_of_single_layers_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = smooth(tmp_path / "layers.json", attn=[1, 0], attn_1=[1, 1])
    with pytest.raises(TableError, match=r"layers\.json: .* single layers, .*; give its depth, .* smoothcache_plan$"):
        from_smoothcache(path, [1, 0])


@pytest.mark.parametrize("rows", [{"attn1": [1, 0, 1, 0, 1]}, {"attn2": [1, 0, 1, 0, 1], "ff": [1, 0, 0, 1, 1]}])
def test_pixart_follows_the_file(rows: dict[str, list[int]], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers_kinds import SIGMA, timesteps, twin
    from diffusers_oracle import replaying
    from tiny import relative_error

    pipe = SIGMA.pipeline()
    table = from_smoothcache(smooth(tmp_path / "s.json", **rows), timesteps(pipe))
    plain = twin(pipe)
    expected = SIGMA.draw(replaying(plain, dict(zip(table.timesteps, table.step_types, strict=True))))
    as_attention = dict(zip(table.timesteps, (NO_CACHE, ATTENTION, NO_CACHE, ATTENTION, NO_CACHE), strict=True))
    found = SIGMA.draw(enable(pipe, table))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(found, SIGMA.draw(replaying(plain, as_attention))) > 1e-4
    assert stats(pipe).steps == {kind.name: table.step_types.count(kind) for kind in dict.fromkeys(table.step_types)}


# A plan, layer by layer


def test_a_list_per_layer_gives_a_plan(tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", attn_0=[1, 0, 0], mlp_1=[1, 0, 1], attn_1=[1, 1, 0], mlp_0=[1, 1, 0])
    plan = smoothcache_plan(path, (20, 10, 0), depth=2, eps_scale=0.95)
    assert plan == Plan(
        tuple(
            StepPlan.by_layer((Branch.SELF_ATTN, Branch.MLP), rows)
            for rows in (((C, C), (C, C)), ((R, C), (C, R)), ((R, R), (R, C)))
        ),
        (20, 10, 0),
        0.95,
    )


def test_a_plan_can_mix_lists_for_all_layers_lists_per_layer_and_none(tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", attn1=[1, 0], ff_0=[1, 1], ff_1=[1, 0])
    branches = (Branch.SELF_ATTN, Branch.CROSS_ATTN, Branch.MLP)
    plan = smoothcache_plan(path, (1, 0), depth=2, branches=branches)
    assert plan.sites == layered(2, branches)
    assert plan.steps[1].rules == (R, C, C, R, C, R)


@pytest.mark.parametrize(
    ("rows", "second_step"),
    [
        ({"attn": [1, 0], "attn-2": [1, 1]}, "rr."),  # a layer's own goes before the one for all
        ({"attn": [1, 1], "attn1-0": [1, 0]}, "r.."),
        ({"attn-2": [1, 0]}, "..r"),  # a layer without any is computed
        ({"attn-0": [1, 0], "attn-1": [1, 1], "attn-2": [1, 0], "attn": [1, 1]}, "r.r"),
        ({"attn": [0, 0]}, "rrr"),  # a 0 before anything is stored is computed
        ({"attn-1": [0, 0], "attn": [0, 1]}, ".r."),
    ],
)
def test_layers_of_their_own(rows: dict[str, list[int]], second_step: str, tmp_path: Path) -> None:
    first, second = smoothcache_plan(smooth(tmp_path / "s.json", **rows), (1, 0), depth=3).steps
    assert first.step_type is NO_CACHE
    assert [second.rule_at(n, Branch.SELF_ATTN) for n in range(3)] == [R if kind == "r" else C for kind in second_step]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ({"attn": [1, 0], "attn-3": [1, 0]}, r"SELF_ATTN: .* layers 0 to 2, got one for layer 3; give the depth"),
        ({"attn2": [1, 0]}, r"CROSS_ATTN: expected lists for SELF_ATTN \+ MLP of .* got one for all layers; "),
        ({"attn2-0": [1, 1]}, r"CROSS_ATTN: .* got one for layer 0; "),
    ],
)
def test_lists_that_do_not_fit_the_model_are_refused(rows: dict[str, list[int]], problem: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=rf"s\.json: {problem}"):
        smoothcache_plan(smooth(tmp_path / "s.json", **rows), (1, 0), depth=3)


# A table, layer by layer


@pytest.mark.parametrize("rows", [{"attn-0": [1, 0, 0], "mlp-1": [1, 0, 1]}, {"attn": [1, 0, 1]}, {"mlp-1": [0, 1, 1]}])
def test_with_the_depth_a_list_per_layer_is_a_table(rows: dict[str, list[int]], tmp_path: Path) -> None:
    """It is for that model alone, even where all layers are alike."""
    path = smooth(tmp_path / "s.json", **rows)
    table = from_smoothcache(path, (20, 10, 0), 0.9, depth=2)
    table.save(tmp_path / "t.json")
    assert CacheTable.load(tmp_path / "t.json") == table
    assert table.plan(shape_of(Branch.SELF_ATTN, Branch.MLP)) == smoothcache_plan(path, (20, 10, 0), 2, 0.9)
    assert table.made is not None
    assert table.made.source == "s.json"
    with pytest.raises(TableError, match=r"^sites: "):
        table.plan(shape_of(*TWO))


@pytest.mark.parametrize("depth", [0, -1, 10_001, 10**9])
def test_a_depth_that_no_model_has_is_refused(depth: int, tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", attn=[1, 0])
    with pytest.raises(TableError, match=rf"s\.json: depth: expected 1 to 10000, got {depth}; "):
        from_smoothcache(path, (1, 0), depth=depth)


Importer = Callable[[Path, Iterable[int]], CacheTable | Plan]


@pytest.mark.parametrize("read", [from_smoothcache, lambda path, timesteps: smoothcache_plan(path, timesteps, 2)])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "expected a list per branch, got none"),
        ("[]", "expected a JSON object"),
        ('{"attn": [1, 0], "attn": [1, 1]}', "attn: expected once, got 2 times"),
        ('{"attn": [1, 0], "attn1": [1, 1]}', "attn1: the branch has a list already"),
        ('{"attn": [1, 0, 1]}', "attn: expected 2, one per timestep, got 3"),
        ('{"attn": [1, 2]}', r"attn: expected a list of 1 \(compute\) and 0 \(reuse\), got \[1, 2\]"),
        ('{"attn": [1, false]}', "attn: expected a list of 1"),
        ('{"attn": [1, 0.0]}', "attn: expected a list of 1"),
        ('{"attn": [1, 1e999]}', "attn: expected a list of 1"),
        ('{"attn": [1, [0]]}', "attn: expected a list of 1"),
        ('{"attn": "10"}', "attn: expected a list of 1"),
        ('{"attn": {"0": [1, 0]}}', "attn: expected a list of 1"),
        ('{"conv": [1, 0]}', "'conv': expected one of attn, mlp, attn1, attn2, ff"),
        ('{"attn-": [1, 0]}', "'attn-': expected one of"),
        ('{"attn--1": [1, 0]}', "'attn--1': expected one of"),
        ('{"attn-123456789": [1, 0]}', "'attn-123456789': expected one of"),
        ('{"attn-\\u0663": [1, 0]}', "'attn-\u0663': expected one of"),
        ('{"a\\nb": [1, 0]}', r"'a\\nb': expected one of"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(read: Importer, text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(TableError, match=rf"s\.json: {problem}"):
        read(tmp_path / "s.json", (1, 0))


@given(row=st.recursive(st.none() | st.booleans() | st.integers(-1, 2) | st.floats(), st.lists, max_leaves=6))
def test_any_value_is_a_list_of_zeros_and_ones_or_refused(row: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({"attn": row}))
    try:
        table = from_smoothcache(path, (1, 0))
    except TableError:
        assert repr(row) not in ("[1, 0]", "[1, 1]", "[0, 0]", "[0, 1]")
    else:
        assert repr(row)[3:] == (" 0]" if table.step_types[1] is SELF else " 1]")
