"""TableSet: tables for several numbers of steps in one file, as strict as the file of one."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from constants import ATTENTION, ATTN_MLP, MLP, NO

from ebcache_fast.apps.method_spec import open_table, open_tables
from ebcache_fast.errors import TableError
from ebcache_fast.plan import Branch, ModelShape, SiteShape
from ebcache_fast.plan.retiming import steps_as_far
from ebcache_fast.plan.table import CacheTable, Provenance
from ebcache_fast.plan.table_set import TableSet, load_tables

FOUR = CacheTable([900, 600.5, 300, 0], [0, 2, 1, 0], made=Provenance(by="hand", source="four"))
TWO = CacheTable([900, 300], [0, 1], eps_scale=0.9)
SHAPE = ModelShape(1, 1, (SiteShape(0, Branch.MLP, 1, 1),), 0, 0, ())
BOTH = TableSet([FOUR, TWO])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    BOTH.save(tmp_path / "set.json")
    return tmp_path / "set.json"


def test_a_set_is_read_back_as_it_was_written(path: Path) -> None:
    assert TableSet.load(path) == load_tables(path) == open_tables(str(path)) == BOTH
    assert (len(BOTH), list(BOTH)) == (2, [FOUR, TWO])
    text = path.read_text()
    assert text.count("\n") == len(text.splitlines())
    assert '      "timesteps": [900, 600.5, 300, 0],' in text.splitlines()


def test_one_loader_reads_both(path: Path, tmp_path: Path) -> None:
    TWO.save(tmp_path / "one.json")
    assert load_tables(tmp_path / "one.json") == TWO
    assert TWO.tables == (TWO,)


def test_each_loader_says_what_the_other_file_is(path: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TableError, match=r"set\.json: format: .*several numbers of steps; load it with TableSet\.load$"
    ):
        CacheTable.load(path)
    TWO.save(tmp_path / "one.json")
    with pytest.raises(TableError, match=r"one\.json: format: .*one table; load it with CacheTable\.load$"):
        TableSet.load(tmp_path / "one.json")


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ([], r"^tables: expected at least one, got none"),
        (
            [TWO, FOUR, TWO.retime([900, 300])],
            r"^tables\[2\]: expected other timesteps than tables\[0\] .* 900 to 300;",
        ),
        ([TWO, "four"], r"^tables\[1\]: expected a CacheTable, got a str"),
    ],
)
def test_what_a_set_can_not_be(tables: list[Any], problem: str) -> None:
    with pytest.raises(TableError, match=problem):
        TableSet(tables)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.update(tables=[]), "tables: expected at least one"),
        (lambda file: file.update(tables={}), "tables: "),
        (lambda file: file["tables"].append(5), r"tables\[2\]: .* got 5"),
        (lambda file: file["tables"].append(file["tables"][0]), r"tables\[2\]: expected other timesteps"),
        (lambda file: file["tables"][1].update(eps_scale=7), r"tables\[1\]: eps_scale: "),
        (lambda file: file["tables"][1].update(note=""), r"tables\[1\]: note: unknown key"),
        (lambda file: file["tables"][0]["timesteps"].append("x"), r"tables\[0\]: timesteps\[4\]: expected a number"),
        (lambda file: file["tables"].append(json.loads(json.dumps(file))), r"tables\[2\]: .*load it with TableSet"),
        (lambda file: file.update(note=""), "note: unknown key"),
        (lambda file: file.update(schema=2), "schema: "),
        (lambda file: file.pop("schema"), "schema: missing"),
        (lambda file: file.update(format="other"), "format: expected 'ebcache-fast.cache-table"),
    ],
)
def test_a_changed_file_is_refused_by_its_field(change: Any, problem: str, path: Path) -> None:
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    for load in (TableSet.load, load_tables):
        with pytest.raises(TableError, match=rf"set\.json: {problem}") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_a_command_takes_the_table_of_its_steps(path: Path) -> None:
    assert open_table(str(path), 4) == FOUR
    for steps in (3, None):
        with pytest.raises(TableError, match=rf"set\.json: steps: expected one of 2, 4, .* got {steps}; "):
            open_table(str(path), steps)
    with pytest.raises(TableError, match=r"^steps: expected one of 2, 2, each of one table, got 2; "):
        TableSet([TWO, TWO.retime([800, 300])]).of_steps(2)


# One table, moved


def test_each_step_takes_the_type_of_the_one_as_far_into_the_run() -> None:
    table = CacheTable([999, 666, 333, 0], [NO, ATTN_MLP, ATTENTION, MLP], 0.9, model={"depth": 2})
    shorter = table.retime([999, 500, 0])
    assert shorter.step_types == (NO, ATTN_MLP, MLP)
    assert (shorter.timesteps, shorter.eps_scale, shorter.model) == ((999, 500, 0), 0.9, table.model)
    longer = table.retime(range(999, -1, -111))
    names = [
        "NO_CACHE",
        "NO_CACHE",
        "ATTN_MLP",
        "ATTN_MLP",
        "ATTN_MLP",
        "ATTENTION",
        "ATTENTION",
        "ATTENTION",
        "MLP",
        "MLP",
    ]
    assert [step_type.name for step_type in longer.step_types] == names


@pytest.mark.parametrize("own", range(1, 9))
@pytest.mark.parametrize("others", range(1, 14))
def test_how_far_into_the_run_a_step_is(own: int, others: int) -> None:
    ends = [Fraction(i, max(1, n - 1)) for n in (own, others) for i in range(n)]
    mine, theirs = ends[:own], ends[own:]
    nearest = [min(range(own), key=lambda i: abs(mine[i] - at)) for at in theirs]  # the earlier of two
    assert steps_as_far(own, others) == nearest


def test_another_scale_of_timesteps_means_nothing() -> None:
    table = CacheTable([999, 666, 333, 0], [NO, ATTN_MLP, ATTENTION, MLP])
    assert table.retime([1.0, 0.25, 0.1]).step_types == table.retime([4000, 3999, 17]).step_types


def test_the_first_step_stays_no_cache_wherever_it_begins() -> None:
    table = CacheTable([999, 666, 333, 0], [NO, ATTN_MLP, ATTENTION, MLP])
    assert table.retime([600.5, 0]).step_types == (NO, MLP)
    assert table.retime([10]).step_types == (NO,)


def test_what_was_seen_at_each_step_is_left_out_of_a_table_of_other_steps() -> None:
    made = Provenance(by="calibrate", source="x", options={"a": 1}, votes={"MLP": (1, 2)}, errors={"MLP": (None, 0.5)})
    table = CacheTable([9, 0], [0, 1], made=made)
    assert table.retime([8, 1]).made == made
    moved = table.retime([9, 5, 0])
    assert moved.made == Provenance(by="calibrate", source="x", options={"a": 1, "retimed_from_steps": 2})
    with pytest.raises(TableError, match=r"^timesteps: expected the table's 2 steps, got 3; .* or retime"):
        table.check(SHAPE, [9, 5, 0])


@pytest.mark.parametrize("timesteps", [[], [5, 5, 1], [1, 2, 3], [3, 2, -1], [3, 2, float("nan")]])
def test_only_timesteps_are_moved_to(timesteps: list[float]) -> None:
    with pytest.raises(TableError, match=r"^timesteps"):
        FOUR.retime(timesteps)
