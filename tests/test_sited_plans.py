"""Tables of sites as plans of models: whom they are for, what their steps do, how people see them."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from constants import ATTN_MLP, NO
from sited import BOTH, PLAN, SITES, TABLE, changed, plan_of, shape_of

from ebcache_fast.apps import console
from ebcache_fast.errors import TableError
from ebcache_fast.plan import (
    Branch,
    Site,
    layered,
)
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.plan.table_set import TableSet, load_tables


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test pulls the plug, so none need wait until the disk has everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def test_it_is_for_its_sites_alone() -> None:
    assert TABLE.plan(shape_of(SITES)) == PLAN
    other = layered(4, BOTH)
    for ask in (TABLE.plan, lambda shape: TABLE.check(shape, TABLE.timesteps)):
        with pytest.raises(TableError, match=r"^sites: the table is for 3 layers of SELF_ATTN \+ MLP, then 1 layers"):
            ask(shape_of(other))
    with pytest.raises(TableError, match=r"^model: .*width 9, not 8"):
        replace(TABLE, model={"width": 9}).plan(shape_of(SITES))


def test_a_plan_of_types_is_a_table_of_the_first_version() -> None:
    plan = plan_of(layered(2, BOTH), "cccc", "rcrc", "rrrr")
    table = CacheTable.from_plan(plan)
    assert table == CacheTable(plan.timesteps, [0, 1, 2], 0.95)
    assert table.document()["schema"] == 1


def test_a_file_that_speaks_of_sites_keeps_to_them_even_where_types_would_do(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(changed(steps=["c", "r", "r", "c", "c"]))
    table = CacheTable.load(tmp_path / "t.json")
    assert table.step_types == (NO, ATTN_MLP, ATTN_MLP, NO, NO)
    with pytest.raises(TableError, match=r"^sites: "):
        table.plan(shape_of(layered(5, BOTH)))
    table.save(tmp_path / "again.json")
    assert CacheTable.load(tmp_path / "again.json") == table


def test_types_are_those_of_the_steps() -> None:
    assert TABLE.step_types == (NO, None, ATTN_MLP, None, None)
    assert TABLE.type_names == ["NO_CACHE", "MIXED", "ATTN_MLP", "MIXED", "MIXED"]
    assert TABLE.step_type_at(40) is None
    with pytest.raises(TableError, match=r"^step_types: expected those of step_plans"):
        replace(TABLE, step_types=(NO, *[ATTN_MLP] * 4))


def test_retime_moves_what_each_step_does() -> None:
    same = TABLE.retime([9, 8, 7, 6, 5])
    assert same == replace(TABLE, timesteps=(9, 8, 7, 6, 5), sampler=None)
    three = TABLE.retime([9, 8, 7])
    assert three.plan(shape_of(SITES)).steps == tuple(PLAN.steps[i] for i in (0, 2, 4))
    more = TABLE.retime(range(9, 0, -1))
    assert more.step_plans is not None
    assert more.step_plans[0] == PLAN.steps[0]
    assert TABLE.retime([7]).plan(shape_of(SITES)).steps == PLAN.steps[:1]


def test_amplifying_is_deliberate_in_a_plan_too() -> None:
    with pytest.raises(TableError, match=r"^eps_scale: .* allow_amplify"):
        CacheTable.from_plan(replace(PLAN, eps_scale=1.5))
    assert CacheTable.from_plan(replace(PLAN, eps_scale=1.5), allow_amplify=True).eps_scale == 1.5


def test_layers_that_are_not_counted_from_0_are_refused() -> None:
    with pytest.raises(TableError, match=r"^sites: expected layers in order from 0, got \[1, 3\]"):
        CacheTable.from_plan(plan_of((Site(1, Branch.MLP), Site(3, Branch.MLP)), "cc", "rc"))


def test_a_set_of_tables_holds_it(tmp_path: Path) -> None:
    tables = TableSet([CacheTable([2, 1], [0, 1]), TABLE])
    tables.save(tmp_path / "set.json")
    assert load_tables(tmp_path / "set.json") == tables


def test_it_is_shown_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(TABLE)
    out = capsys.readouterr().out
    assert "#x.xx" in out
    assert "x MIXED 3" in out
    assert "sites: 3 layers of SELF_ATTN + MLP, then 1 layers of SELF_ATTN" in out
    assert "NOx1 mixedx1 A+Mx1 mixedx2" in out
