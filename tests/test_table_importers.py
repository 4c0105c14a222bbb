"""Importers, tried on tables like those that other projects released, and on what is none of them."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebcache_fast.cache_table import CacheTable
from ebcache_fast.errors import TableError
from ebcache_fast.plan import Action, Branch, Plan, StepPlan, StepType
from ebcache_fast.table_importers import (
    eps_scale_from_adm,
    eps_scale_from_eb_delta,
    eps_scale_of,
    from_eb_npy,
    from_smoothcache,
    smoothcache_plan,
)

NO_CACHE, ATTENTION, ATTN_MLP, MLP = StepType
C, R = Action.COMPUTE, Action.REUSE
T50 = range(49, -1, -1)
T4 = (30, 20, 10, 0)

# EB-Cache's released table, as its array stands in the file.
RELEASED = [0, 2, 2, 0, 2, 2, 0, 2, 2, 2, *[0, 2] * 9, *[0] * 22]


def npy(path: Path, array: object) -> Path:
    np.save(path, np.asarray(array), allow_pickle=True)
    return path


def smooth(path: Path, **rows: object) -> Path:
    path.write_text(json.dumps({name.replace("_", "-"): row for name, row in rows.items()}))
    return path


# EB-Cache


def test_the_released_array_runs_its_first_entry_first(tmp_path: Path) -> None:
    table = from_eb_npy(npy(tmp_path / "t.npy", RELEASED), T50)
    assert table.step_types == tuple(RELEASED)
    assert table.timesteps == tuple(T50)
    assert Counter(table.step_types) == {NO_CACHE: 34, ATTN_MLP: 16}
    assert max(table.timesteps[i] for i, t in enumerate(table.step_types) if t is ATTN_MLP) == 48
    # The hand rule that the array follows in this order, and in no other.
    rule = [i == 49 or i < 10 or (49 - i) % (3 if i > 40 else 2 if i > 20 else 1) == 0 for i in T50]
    assert [t is NO_CACHE for t in table.step_types] == rule


def test_order_index_reproduces_the_release(tmp_path: Path) -> None:
    table = from_eb_npy(npy(tmp_path / "t.npy", RELEASED), T50, order="index")
    assert [table.step_type_at(i) for i in range(50)] == RELEASED
    assert all(i < 28 for i in T50 if table.step_type_at(i) is ATTN_MLP)
    assert table != from_eb_npy(tmp_path / "t.npy", T50)


def test_an_import_says_where_it_comes_from(tmp_path: Path) -> None:
    made = from_eb_npy(npy(tmp_path / "t.npy", [0, 1]), [1, 0], order="execution").made
    assert made is not None
    assert (made.source, made.options) == ("t.npy", {"order": "execution"})


@pytest.mark.parametrize("dtype", ["int64", "uint8", ">i4"])
def test_all_codes_and_integer_types(dtype: str, tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", np.array([0, 1, 2, 3], dtype))
    assert from_eb_npy(path, T4).step_types == (NO_CACHE, ATTENTION, ATTN_MLP, MLP)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        ([0.0, 2.0, 0.0, 0.0], "expected a 1-D array of integers 0 to 3, got float64"),
        ([False, True, True, True], "expected a 1-D array of integers 0 to 3, got bool"),
        ([[0, 2], [0, 2]], r"expected a 1-D .* of shape \(2, 2\)"),
        (np.array(0), r"expected a 1-D .* of shape \(\)"),
        (["0", "2"], "expected a 1-D array of integers"),
        ([0, 7, 0, 0], r"step_types\[1\]: expected an integer from 0 to 3, got 7"),
        ([0, -1, 0, 0], r"step_types\[1\]: .* got -1"),
        ([0, 2, 0], "step_types: expected 4, one per timestep, got 3"),
        ([0, 2, 0, 0, 0], "step_types: expected 4, one per timestep, got 5"),
        ([2, 2, 0, 0], r"step_types\[0\]: expected NO_CACHE"),
        (np.array([0, None, 2], dtype=object), "expected a .npy array, saved without pickle: "),
    ],
)
def test_a_wrong_array_is_refused(array: object, problem: str, tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", array)
    with pytest.raises(TableError, match=rf"^{path}: {problem}"):
        from_eb_npy(path, T4)


def test_an_order_that_starts_with_a_cached_step_is_refused(tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", [0, 0, 0, 2])
    assert from_eb_npy(path, T4).step_types[-1] is ATTN_MLP
    with pytest.raises(TableError, match=r"step_types\[0\]: expected NO_CACHE, got ATTN_MLP"):
        from_eb_npy(path, T4, order="index")
    with pytest.raises(TableError, match="order: expected one of execution, index, got 'reversed'"):
        from_eb_npy(path, T4, order="reversed")


def archive() -> bytes:
    buffer = BytesIO()
    np.savez(buffer, np.zeros(4, int))
    return buffer.getvalue()


def with_header(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


EIGHT_EXBIBYTES = with_header("{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,)}\n")
LONG_HEADER = with_header(" " * 20_000)  # numpy's message on it has two lines


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", archive(), EIGHT_EXBIBYTES, LONG_HEADER, b"0, 2, 2", b"\x80\x04."]
)
def test_a_file_that_is_no_array_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(TableError, match=r"t\.npy: expected a \.npy array, saved without pickle: .") as caught:
        from_eb_npy(tmp_path / "t.npy", T4)
    assert "\n" not in str(caught.value)


@given(start=st.integers(0, 160), length=st.integers(0, 4), instead=st.binary(max_size=4))
def test_a_damaged_array_is_refused_or_read_as_numpy_reads_it(
    start: int, length: int, instead: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = BytesIO()
    np.save(buffer, np.array([0, 2, 1, 3]))
    whole = buffer.getvalue()
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    path.write_bytes(whole[:start] + instead + whole[start + length :])
    try:
        table = from_eb_npy(path, T4)
    except TableError as error:
        problem = str(error)
    else:
        problem = ""
        assert table.step_types == tuple(np.load(path))
    assert "\n" not in problem


# SmoothCache


def test_both_branches_together_give_no_cache_and_attn_mlp(tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", attn=[1, 0, 0, 1], mlp=[1, 0, 0, 1])
    table = from_smoothcache(path, T4, eps_scale=0.9)
    assert table.step_types == (NO_CACHE, ATTN_MLP, ATTN_MLP, NO_CACHE)
    assert (table.timesteps, table.eps_scale) == (T4, 0.9)
    assert table.made is not None
    assert table.made.source == "s.json"


def test_every_combination_of_two_branches_is_a_step_type(tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", mlp=[1, 1, 0, 0], attn=[1, 0, 0, 1])
    assert from_smoothcache(path, T4).step_types == (NO_CACHE, ATTENTION, ATTN_MLP, MLP)


@pytest.mark.parametrize(
    ("rows", "step_types"),
    [
        ({"attn1": [1, 0, 1, 0]}, (NO_CACHE, ATTENTION, NO_CACHE, ATTENTION)),
        ({"ff": [1, 0, 1, 0]}, (NO_CACHE, MLP, NO_CACHE, MLP)),
        ({"attn1": [1, 0, 1, 0], "ff": [1, 0, 0, 1]}, (NO_CACHE, ATTN_MLP, MLP, ATTENTION)),
        ({"attn1": [1, 0, 0, 1], "attn2": [1, 0, 0, 1]}, (NO_CACHE, ATTENTION, ATTENTION, NO_CACHE)),
        (
            {"attn1": [1, 0, 0, 1], "attn2": [1, 0, 0, 1], "ff": [1, 1, 0, 0]},
            (NO_CACHE, ATTENTION, ATTN_MLP, MLP),
        ),
    ],
)
def test_a_branch_without_a_list_is_computed(
    rows: dict[str, list[int]], step_types: tuple[StepType, ...], tmp_path: Path
) -> None:
    assert from_smoothcache(smooth(tmp_path / "s.json", **rows), T4).step_types == step_types


def test_what_only_a_plan_can_hold_is_refused_with_the_remedy(tmp_path: Path) -> None:
    per_layer = smooth(tmp_path / "layers.json", attn_0=[1, 0], attn_1=[1, 1])
    with pytest.raises(TableError, match=r"layers\.json: .* single layers.*; use smoothcache_plan$"):
        from_smoothcache(per_layer, [1, 0])
    split = smooth(tmp_path / "split.json", attn1=[1, 1], attn2=[1, 0])
    with pytest.raises(TableError, match=r"split\.json: step 1: no step type reuses CROSS_ATTN alone; use smoo"):
        from_smoothcache(split, [1, 0])


def test_a_list_per_layer_gives_a_plan(tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", attn_0=[1, 0, 0], mlp_1=[1, 0, 1], attn_1=[1, 1, 0], mlp_0=[1, 1, 0])
    plan = smoothcache_plan(path, (20, 10, 0), depth=2, eps_scale=0.95)
    assert plan == Plan(
        tuple(
            StepPlan((Branch.SELF_ATTN, Branch.MLP), rows)
            for rows in (((C, C), (C, C)), ((R, C), (C, R)), ((R, R), (R, C)))
        ),
        (20, 10, 0),
        0.95,
    )


def test_a_plan_can_mix_lists_for_all_layers_lists_per_layer_and_none(tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", attn1=[1, 0], ff_0=[1, 1], ff_1=[1, 0])
    branches = (Branch.SELF_ATTN, Branch.CROSS_ATTN, Branch.MLP)
    plan = smoothcache_plan(path, (1, 0), depth=2, branches=branches)
    assert plan.branches == branches
    assert plan.steps[1].actions == ((R, C, C), (R, C, R))


def test_uniform_files_give_the_same_plan_both_ways(tmp_path: Path) -> None:
    path = smooth(tmp_path / "s.json", attn=[1, 0, 1, 0], mlp=[1, 0, 0, 1])
    table = from_smoothcache(path, T4)
    branches = (Branch.SELF_ATTN, Branch.MLP)
    assert smoothcache_plan(path, T4, depth=3) == Plan.from_types(table.step_types, T4, 3, branches)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ({"attn-0": [1, 0], "attn-1": [1, 0]}, "SELF_ATTN: expected a list for all layers or each of 0 to 2"),
        ({"attn-0": [1, 0], "attn-1": [1, 0], "attn-3": [1, 0]}, "SELF_ATTN: "),
        ({f"attn-{n}": [1, 0] for n in range(4)}, "SELF_ATTN: .* got 4"),
        ({"attn": [1, 0], **{f"attn-{n}": [1, 0] for n in range(3)}}, "SELF_ATTN: "),
        ({"attn2": [1, 0]}, r"CROSS_ATTN: .* for SELF_ATTN \+ MLP, got 1"),
        ({"attn": [0, 1]}, r"steps\[0\]\.actions\[0\]: .* NO_CACHE"),
    ],
)
def test_lists_that_do_not_fit_the_model_are_refused(rows: dict[str, list[int]], problem: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(rows))
    with pytest.raises(TableError, match=rf"s\.json: {problem}"):
        smoothcache_plan(tmp_path / "s.json", (1, 0), depth=3)


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
        assert repr(row) not in ("[1, 0]", "[1, 1]")
    else:
        assert repr(row) == ("[1, 0]" if table.step_types[1] is ATTENTION else "[1, 1]")


# Noise scaling


def test_scales_that_divide_become_ones_that_multiply() -> None:
    assert eps_scale_from_adm(1.005) == 1 / 1.005
    assert eps_scale_from_eb_delta(0.965) == pytest.approx(1.0362694)
    assert eps_scale_from_adm(1) == 1.0


@pytest.mark.parametrize("convert", [eps_scale_from_adm, eps_scale_from_eb_delta])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 5e-324])
def test_scales_that_can_not_divide_are_refused(convert: Callable[[float], float], value: float) -> None:
    with pytest.raises(TableError, match=r"^(lam|delta): expected a finite number above 0, got "):
        convert(value)


def test_one_of_three_conventions_gives_b() -> None:
    assert eps_scale_of(None) == 1.0
    assert eps_scale_of(0.955) == 0.955
    assert eps_scale_of(None, adm_lambda=1.25) == eps_scale_of(None, eb_delta=1.25) == 0.8
    for several in ((0.9, 1.1, None), (0.9, None, 0.965), (None, 1.1, 0.965), (1.0, 1.0, 1.0)):
        with pytest.raises(TableError, match=r"^eps_scale, adm_lambda and eb_delta all mean b; give one"):
            eps_scale_of(*several)


def test_the_released_amplification_needs_the_flag(tmp_path: Path) -> None:
    b = eps_scale_from_eb_delta(0.965)
    path = npy(tmp_path / "t.npy", [0, 2])
    with pytest.raises(TableError, match=r"eps_scale: .* with allow_amplify"):
        from_eb_npy(path, [1, 0], eps_scale=b)
    assert from_eb_npy(path, [1, 0], eps_scale=b, allow_amplify=True).eps_scale == b
    schedule = smooth(tmp_path / "s.json", attn=[1, 0])
    with pytest.raises(TableError, match=r"eps_scale: .* with allow_amplify"):
        from_smoothcache(schedule, [1, 0], eps_scale=b)
    assert from_smoothcache(schedule, [1, 0], eps_scale=b, allow_amplify=True).eps_scale == b
