"""Tables whose sites differ: any plan is kept and comes back, and no wrong file passes for one."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from constants import NO
from hypothesis import given
from hypothesis import strategies as st
from sited import BOTH, FILE, TABLE, C, R, changed, shape_of

from ebcache_fast.errors import TableError
from ebcache_fast.plan import (
    Branch,
    KeepSpan,
    Plan,
    Rule,
    Site,
    SkipSpan,
    StepPlan,
    layered,
)
from ebcache_fast.plan.rules import Compute, Forecast, FullAndWindow, Reuse, SharedByGuidance, Tokens, Window
from ebcache_fast.plan.table import CacheTable, Provenance
from ebcache_fast.plan.table_file import MAX_BYTES

RULES: dict[Branch, list[Rule]] = {
    Branch.SELF_ATTN: [C, R, Window(2), FullAndWindow(2), SharedByGuidance()],
    Branch.CROSS_ATTN: [C, R, Compute(1), Reuse(1), Forecast(1)],
    Branch.MLP: [C, R, Tokens(3), Tokens(4), Forecast(0), Forecast(1), SharedByGuidance()],
}


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test pulls the plug, so none need wait until the disk has everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan of any sites: of plain rules, or of every rule after two steps that keep all that rules may read."""
    branches = st.lists(st.sampled_from(Branch), min_size=1, max_size=3, unique=True)
    groups = draw(st.lists(st.tuples(st.integers(1, 4), branches), min_size=1, max_size=3))
    layers = [names for count, names in groups for _ in range(count)]
    sites = tuple(Site(layer, branch) for layer, names in enumerate(layers) for branch in names)
    is_plain, last = draw(st.booleans()), len(sites) - 1
    rows = draw(st.lists(st.tuples(*[st.sampled_from([C, R] if is_plain else RULES[s.branch]) for s in sites])))
    steps = [StepPlan(sites, row) for row in rows]
    if not is_plain:
        spans = st.sampled_from([(), (KeepSpan(0, last),), (SkipSpan(0, last),)])
        kept = [FullAndWindow(2) if site.branch is Branch.SELF_ATTN else Compute(1) for site in sites]
        steps = [StepPlan(sites, tuple(kept), (KeepSpan(0, last),))]
        steps += [StepPlan(sites, row, draw(spans)) for row in rows]
    steps = [StepPlan.uniform(NO, sites), *steps]
    return Plan(tuple(steps), tuple(range(10 * len(steps), 0, -10)), 0.95)


def problem_of(path: Path, text: str | None = None) -> str:
    """The message that loading gives: one line that begins with the path."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(TableError) as caught:
        CacheTable.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500
    return message.removeprefix(f"{path}: ")


def test_the_file_is_the_documented_one(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text() == FILE
    assert CacheTable.load(tmp_path / "t.json") == TABLE


@given(plan=plans())
def test_any_plan_comes_back_from_its_file(plan: Plan, folder: Path) -> None:
    table = CacheTable.from_plan(plan)
    table.save(folder / "t.json")
    loaded = CacheTable.load(folder / "t.json")
    assert (loaded, hash(loaded), repr(loaded)) == (table, hash(table), repr(table))
    assert loaded.plan(shape_of(plan.sites)) == plan
    has_types = all(step.step_type is not None for step in plan.steps)
    assert json.loads((folder / "t.json").read_text())["schema"] == (1 if has_types else 2)
    assert loaded.step_types == tuple(step.step_type for step in plan.steps)


@given(plan=plans(), start=st.integers(0, 2000), length=st.integers(0, 9), instead=st.binary(max_size=3))
def test_damaged_bytes_give_a_valid_table_or_one_line(
    plan: Plan, start: int, length: int, instead: bytes, folder: Path
) -> None:
    path = folder / "damaged.json"
    CacheTable.from_plan(plan).save(path)
    whole = path.read_bytes()
    start %= len(whole)
    path.write_bytes(whole[:start] + instead + whole[start + length :])
    try:
        table = CacheTable.load(path)
    except TableError:
        problem_of(path)
        return
    document = json.loads(path.read_bytes())
    if table.step_plans is not None:  # read as written: nothing in it has a second spelling
        assert document["steps"] == table.document()["steps"] or document["kinds"] != table.document()["kinds"]
        assert document["sites"] == table.document()["sites"]


KINDS = {"c": {"rule": "compute"}, "r": {"rule": "reuse"}}
FIVE = ["c", "r", "r", "r", "(r c)*3 c"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"schema": 3}, "schema: expected 1 or 2, got 3; install"),
        ({"schema": 2.0}, "schema: expected a valid integer"),
        ({"schema": True}, "schema: "),
        ({"schema": 1}, "step_types: missing"),
        ({"step_types": []}, "step_types: unknown key; leave it out"),
        ({"sites": []}, "sites: expected one or more layers, got none"),
        ({"sites": {}}, "sites: "),
        ({"sites": [{"layers": 0, "branches": ["MLP"]}]}, "sites[0].layers: "),
        ({"sites": [{"layers": 10**9, "branches": ["MLP"]}]}, "sites[0].layers: expected less than or equal to 10000"),
        ({"sites": [{"layers": 2, "branches": ["MLP", "MLP"]}]}, "sites[0].branches: expected one or more, each once"),
        ({"sites": [{"layers": 2, "branches": []}]}, "sites[0].branches: expected one or more, each once"),
        ({"sites": [{"layers": 2, "branches": ["FF"]}]}, "sites[0].branches[0]: expected 'SELF_ATTN'"),
        ({"sites": [{"layers": 2, "branches": ["MLP"]}] * 2}, "sites[1]: expected other branches than the layers befo"),
        ({"sites": [{"layers": 2, "branches": ["MLP"]}]}, "steps[1]: expected 2 kinds, one for each site, got 7"),
        ({"kinds": {}}, "steps[0]: kind c is unknown"),
        ({"kinds": KINDS | {"f": {"rule": "frobnicate"}}}, "kinds.f: rule 'frobnicate' is unknown: expected one of "),
        ({"kinds": KINDS | {"f": {"rule": ""}}}, "kinds.f: rule '' is unknown: "),
        ({"kinds": KINDS | {"f": {}}}, "kinds.f: rule: expected the name of a rule, got None"),
        ({"kinds": KINDS | {"f": {"rule": 1}}}, "kinds.f: rule: expected the name of a rule, got 1"),
        (
            {"kinds": KINDS | {"r": {"rule": "reuse", "kept": 1}}},
            "kinds.r: rule 'reuse': expected the arguments 'age'",
        ),
        (
            {"kinds": KINDS | {"r": {"rule": "reuse", "age": "1"}}},
            "kinds.r: rule 'reuse': age: expected an integer",
        ),
        ({"kinds": KINDS | {"r": {"rule": "reuse", "age": True}}}, "kinds.r: rule 'reuse': age: expected an integer"),
        ({"kinds": KINDS | {"r": {"rule": "reuse", "age": -1}}}, "steps[1]: 0.self_attn: age: expected 0 or more"),
        (
            {"kinds": KINDS | {"t": {"rule": "tokens"}}},
            "kinds.t: rule 'tokens': expected the arguments 'count', got",
        ),
        ({"kinds": KINDS | {"r2": {"rule": "reuse"}}}, "kinds.r2: expected another rule than r is; name each"),
        ({"kinds": KINDS | {"R": {"rule": "reuse"}}}, "kinds.R: expected a name of a-z"),
        ({"kinds": KINDS | {"a\nb": {"rule": "reuse"}}}, r"kinds.a\nb: expected a name of a-z"),
        ({"kinds": KINDS | {"r": ["reuse"]}}, "kinds.r: "),
        ({"kinds": KINDS | {"r": {"rule": "reuse", "x": [1]}}}, "kinds.r.x: "),
        ({"kinds": KINDS, "steps": ["c"] * 5}, "kinds.r: no step has it; leave it out"),
        ({"steps": FIVE[:-1]}, "step_types: expected 5, one per timestep, got 4"),
        ({"steps": [*FIVE[:-1], 3]}, "steps[4]: expected a valid string"),
        ({"steps": [*FIVE[:-1], "q"]}, "steps[4]: kind q is unknown: expected one of c, r; "),
        ({"steps": [*FIVE[:-1], ""]}, "steps[4]: expected kinds such as c, "),
        ({"steps": [*FIVE[:-1], "r  c*6"]}, "steps[4]: expected kinds such as c, "),
        ({"steps": [*FIVE[:-1], "r*0 c*7"]}, "steps[4]: expected kinds such as c, "),
        ({"steps": [*FIVE[:-1], "((r c)*2 r)*1"]}, "steps[4]: expected kinds such as c, "),
        ({"steps": [*FIVE[:-1], "r c*5"]}, "steps[4]: expected 7 kinds, one for each site, got 6"),
        ({"steps": [*FIVE[:-1], "r c*9999999"]}, "steps[4]: expected 7 kinds, one for each site, got 10000000"),
        ({"steps": [*FIVE[:-1], "r c c c c c c"]}, "steps[4]: expected the spelling 'r c*6', got 'r c c"),
        ({"steps": [*FIVE[:-1], "r*7"]}, "steps[4]: expected the spelling 'r', got 'r*7'"),
        ({"steps": [*FIVE[:-1], "r c r c r c c"]}, "steps[4]: expected the spelling '(r c)*3 c', got "),
        (
            {"steps": ["r c*6", "c", "c", "c", "c"]},
            "steps[0]: SELF_ATTN of layer 0 reads its output, which no step st",
        ),
        ({"steps": "crrrr"}, "steps: "),
        ({"timesteps": [50, 40, 30, 20]}, "step_types: expected 4, one per timestep, got 5"),
        ({"eps_scale": 1.5}, "eps_scale: "),
        ({"sampler": {"name": "ddim", "steps": 4, "train_steps": 1000}}, "sampler.steps: expected 5"),
    ],
)
def test_what_such_a_file_can_not_be(values: dict[str, Any], problem: str, tmp_path: Path) -> None:
    assert problem_of(tmp_path / "wrong.json", changed(**values)).startswith(problem)


@pytest.mark.parametrize("key", ["sites", "kinds", "steps"])
def test_no_key_may_be_missing(key: str, tmp_path: Path) -> None:
    document = json.loads(FILE)
    del document[key]
    assert problem_of(tmp_path / "t.json", json.dumps(document)) == f"{key}: missing; every key must be there"


def test_other_names_of_kinds_are_read_too(tmp_path: Path) -> None:
    text = (
        FILE.replace('"c":', '"all":').replace('"r":', '"kept":').replace('"c",', '"all",').replace('"r",', '"kept",')
    )
    text = text.replace("r c*2 r c r*2", "kept all*2 kept all kept*2").replace("(r c)*3 c", "(kept all)*3 all")
    (tmp_path / "t.json").write_text(text)
    assert CacheTable.load(tmp_path / "t.json") == TABLE


def test_a_file_of_few_bytes_can_not_fill_the_memory(tmp_path: Path) -> None:
    """1,000 rows of 30,000 sites."""
    sites = [{"layers": 10_000, "branches": ["SELF_ATTN", "CROSS_ATTN", "MLP"]}]
    rows = ["c", *(f"c*{n} r*{30_000 - n}" for n in range(2, 1001))]
    text = changed(sites=sites, steps=rows, timesteps=list(range(1000, 0, -1)))
    assert problem_of(tmp_path / "t.json", text).startswith(
        "steps: expected at most 4194304 rules, got 1000 rows of 30"
    )


def test_a_table_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table = CacheTable([1, 0], [0, 1], made=Provenance(by="x" * MAX_BYTES, source=""))
    with pytest.raises(TableError, match=r"t\.json: expected a table of at most 4194304 bytes, got 4\d+; nothing is"):
        table.save(path)
    assert not path.exists()


def test_rules_over_spans_follow_those_of_sites(tmp_path: Path) -> None:
    sites = layered(4, BOTH)
    kept = StepPlan(sites, (C,) * 8, (KeepSpan(0, 3), KeepSpan(4, 7)))
    table = CacheTable.from_plan(Plan((kept, StepPlan(sites, (C,) * 4 + (R,) * 4, (SkipSpan(0, 3),))), (9, 8)))
    table.save(tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["steps"] == ["c + k k2", "c*4 r*4 + s"]
    assert document["kinds"]["k2"] == {"rule": "keep_span", "first": 4, "last": 7}
    assert CacheTable.load(tmp_path / "t.json") == table
    for row, problem in (
        ("c + k2 k", r"steps\[0\]: span 0 to 3: expected sites from 8"),
        ("c + c", r"steps\[0\]: kind c is for single sites, expected one for spans"),
        ("k", r"steps\[0\]: kind k is for spans of sites; write it after"),
        ("c + ", r"steps\[0\]: expected kinds such as"),
        ("c + q", r"steps\[0\]: kind q is unknown"),
    ):
        wrong = json.dumps(document | {"steps": [row, "c*4 r*4 + s"]})
        assert re.match(problem, problem_of(tmp_path / "wrong.json", wrong))


# Using one
