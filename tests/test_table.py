"""The cache table: what it accepts, what its file holds, and that no wrong file passes for a table."""

import copy
import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebcache_fast.errors import TableError
from ebcache_fast.plan import Branch, ModelShape, Plan, SiteShape, StepPlan, StepType, layered, repeated, table_file
from ebcache_fast.plan import table as cache_table
from ebcache_fast.plan.table import CacheTable, Provenance, SamplerSpec, named_tables
from ebcache_fast.plan.table_schema import StepName

NO_CACHE, ATTENTION, ATTN_MLP, MLP, *_ = StepType

SHAPE = ModelShape(
    width=8,
    tokens=4,
    site_shapes=repeated(2, (SiteShape(0, Branch.SELF_ATTN, 10, 10), SiteShape(0, Branch.MLP, 20, 20))),
    fixed_macs=1,
    fixed_weights=1,
    sizes=(("depth", 2), ("width", 8)),
)

FULL = CacheTable(
    timesteps=[999, 500, 0],
    step_types=[NO_CACHE, ATTN_MLP, ATTENTION],
    eps_scale=0.955,
    sampler=SamplerSpec(name="ddpm", steps=3, train_steps=1000),
    model={"width": 8, "depth": 2},
    made=Provenance(
        by="calibrate",
        source='a "test"\n',
        options={"b": 0.955, "samples": 8, "literal": False, "cap": None, "norm": "rms"},
        errors={"ATTENTION": (None, 0.25, 0.5), "ATTN_MLP": (None, 0.0, 1.0)},
        votes={"NO_CACHE": (8, 0, 1), "ATTN_MLP": (0, 8, 7)},
    ),
)

FULL_FILE = r"""{
  "format": "ebcache-fast.cache-table",
  "schema": 1,
  "model": {
    "depth": 2,
    "width": 8
  },
  "sampler": {
    "name": "ddpm",
    "steps": 3,
    "train_steps": 1000
  },
  "timesteps": [999, 500, 0],
  "step_types": ["NO_CACHE", "ATTN_MLP", "ATTENTION"],
  "eps_scale": 0.955,
  "allow_amplify": false,
  "made": {
    "by": "calibrate",
    "source": "a \"test\"\n",
    "options": {
      "b": 0.955,
      "samples": 8,
      "literal": false,
      "cap": null,
      "norm": "rms"
    },
    "errors": {
      "ATTENTION": [null, 0.25, 0.5],
      "ATTN_MLP": [null, 0.0, 1.0]
    },
    "votes": {
      "NO_CACHE": [8, 0, 1],
      "ATTN_MLP": [0, 8, 7]
    }
  }
}
"""


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test pulls the plug, so none need wait until the disk has everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def problem_of(path: Path) -> str:
    """The message that loading gives: one line that begins with the path."""
    with pytest.raises(TableError) as caught:
        CacheTable.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400
    return message.removeprefix(f"{path}: ")


# Making one in code


def test_every_field_but_the_two_sequences_is_optional() -> None:
    table = CacheTable(timesteps=[2, 1], step_types=[NO_CACHE, MLP])
    assert table.timesteps == (2, 1)
    assert table.step_types == (NO_CACHE, MLP)
    assert (table.eps_scale, table.allow_amplify) == (1.0, False)
    assert (table.sampler, table.model, table.made) == (None, None, None)
    assert len(table) == 2


@pytest.mark.parametrize(
    "timesteps",
    [(999.0, 799.2, 0.0), np.array([999, 799.2, 0]), np.array([999, 799.2, 0]).tolist(), torch.tensor([999, 799.2, 0])],
)
def test_whole_timesteps_become_ints_and_others_stay_as_they_are(timesteps: Any) -> None:
    table = CacheTable(timesteps, [0, 1, 2])
    assert [type(t) for t in table.timesteps] == [int, float, int]
    assert table.timesteps == tuple(float(t) for t in timesteps)
    plan = Plan.uncached(timesteps, layered(1, (Branch.MLP,)))
    assert repr(plan.timesteps) == repr(table.timesteps)


def test_half_precision_is_taken_as_it_is() -> None:
    assert CacheTable(torch.tensor([999, 990], dtype=torch.bfloat16), [0, 1]).timesteps == (1000, 992)


def test_arrays_and_codes_become_plain_ints_and_step_types() -> None:
    table = CacheTable(np.array([5, 3]), np.array([0, 2]), eps_scale=np.float32(0.5))
    assert table == CacheTable([5, 3], [NO_CACHE, ATTN_MLP], 0.5)
    assert [type(t) for t in table.timesteps] == [int, int]
    assert table.step_types[1] is ATTN_MLP
    assert type(table.eps_scale) is float


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"timesteps": []}, "timesteps: expected at least one"),
        ({"timesteps": [3, 3, 1]}, r"timesteps\[1\]: expected less than 3"),
        ({"timesteps": [1, 2, 3]}, r"timesteps\[1\]: expected less than 1"),
        ({"timesteps": [2, 1, -1]}, r"timesteps\[2\]: expected a number from 0 to \d+, got -1"),
        ({"timesteps": [2, 1, False]}, r"timesteps\[2\]: .* got False"),
        ({"timesteps": [2.5, 1.5, -0.5]}, r"timesteps\[2\]: expected a number .* got -0\.5"),
        ({"timesteps": [float("inf"), 1, 0]}, r"timesteps\[0\]: .* got inf"),
        ({"timesteps": [2, float("nan"), 0]}, r"timesteps\[1\]: .* got nan"),
        ({"timesteps": [2, 1j, 0]}, r"timesteps\[1\]: .* got 1j"),
        ({"timesteps": [2.0**63, 1, 0]}, r"timesteps\[0\]: "),
        ({"timesteps": [9.5, 9.5, 0]}, r"timesteps\[1\]: expected less than 9\.5, .* Heun's .* use another one"),
        ({"timesteps": np.ones((3, 1))}, r"timesteps\[0\]: "),
        ({"timesteps": ["2", 1, 0]}, r"timesteps\[0\]: .* got '2'"),
        ({"timesteps": [10**5000, 1, 0]}, r"timesteps\[0\]: .* beyond 64 bits"),
        ({"timesteps": [2**63, 1, 0]}, r"timesteps\[0\]: "),
        ({"timesteps": [1000, 1, 0]}, r"timesteps\[0\]: expected less than sampler.train_steps, 1000"),
        ({"timesteps": [2, 1]}, "step_types: expected 2, one per timestep, got 3"),
        ({"step_types": [NO_CACHE]}, "step_types: expected 3"),
        (
            {"step_types": [ATTENTION, ATTENTION, NO_CACHE]},
            r"step_types\[0\]: expected NO_CACHE, got ATTENTION",
        ),
        ({"step_types": [0, 8, 0]}, r"step_types\[1\]: expected an integer from 0 to 7, got 8"),
        ({"step_types": [0, True, 0]}, r"step_types\[1\]: .* got True"),
        ({"step_types": [0, 2.0, 0]}, r"step_types\[1\]: .* got 2\.0"),
        ({"step_types": [0, "MLP", 0]}, r"step_types\[1\]: .* got 'MLP'"),
        ({"eps_scale": 0}, "eps_scale: .* got 0; "),
        ({"eps_scale": -0.5}, "eps_scale: .* got -0.5; "),
        ({"eps_scale": 1.001}, "eps_scale: .* at most 1, got 1.001; with allow_amplify"),
        ({"eps_scale": True}, "eps_scale: "),
        ({"eps_scale": "0.9"}, "eps_scale: "),
        ({"eps_scale": float("nan")}, "eps_scale: "),
        ({"eps_scale": float("inf"), "allow_amplify": True}, "eps_scale: "),
        ({"eps_scale": 10**5000, "allow_amplify": True}, "eps_scale: .* beyond 64 bits"),
        ({"model": {"depth": -1}}, "model.depth: "),
        ({"model": {"depth": 2.0}}, "model.depth: "),
        ({"sampler": SamplerSpec(name="ddim", steps=4, train_steps=1000)}, "sampler.steps: expected 3"),
        ({"made": Provenance(by="x", source="", errors={"MLP": (1.0,)})}, "made.errors.MLP: expected 3"),
        ({"made": Provenance(by="x", source="", votes={"MLP": (1,)})}, "made.votes.MLP: expected 3"),
    ],
)
def test_what_a_table_can_not_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(TableError, match=f"^{problem}"):
        replace(FULL, **change)


@pytest.mark.parametrize("eps_scale", [1 / 0.965, 7, Fraction(3, 2)])
def test_amplifying_is_possible_but_deliberate(eps_scale: float, tmp_path: Path) -> None:
    table = CacheTable([0], [NO_CACHE], eps_scale, allow_amplify=True)
    assert table.eps_scale == eps_scale
    table.save(tmp_path / "t.json")
    assert CacheTable.load(tmp_path / "t.json") == table


@pytest.mark.parametrize(
    ("record", "values", "problem"),
    [
        (SamplerSpec, {"name": "DDPM", "steps": 1, "train_steps": 2}, "name: "),
        (
            SamplerSpec,
            {"name": "ddpm", "steps": "1", "train_steps": 2},
            "steps: expected a valid integer, got '1'",
        ),
        (SamplerSpec, {"name": "ddpm", "steps": 1}, "train_steps: missing"),
        (Provenance, {"by": "x", "source": "", "note": ""}, "note: unknown key"),
        (Provenance, {"by": 1, "source": ""}, "by: "),
        (Provenance, {"by": "x", "source": "", "options": {"a": [1]}}, "options.a: expected a finite number"),
        (Provenance, {"by": "x", "source": "", "options": {"a": float("inf")}}, "options.a: "),
        (Provenance, {"by": "x", "source": "", "options": {"a": 2**70}}, "options.a: .* beyond 64 bits"),
        (Provenance, {"by": "x", "source": "", "errors": {"MLP": (0.5, -1)}}, r"errors.MLP\[1\]: .* got -1"),
        (Provenance, {"by": "x", "source": "", "errors": {"MLP": (float("nan"),)}}, r"errors.MLP\[0\]: "),
        (Provenance, {"by": "x", "source": "", "votes": {"OTHER": (1,)}}, "votes.OTHER"),
        (Provenance, {"by": "x", "source": "", "votes": {"MLP": (1.5,)}}, r"votes.MLP\[0\]: "),
    ],
)
def test_records_are_as_strict_as_the_table(
    record: type[SamplerSpec | Provenance], values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TableError, match=f"^{problem}"):
        record(**values)


def test_step_names_of_the_file_are_the_step_types() -> None:
    assert list(get_args(StepName)) == [step_type.name for step_type in StepType]


def test_tables_are_immutable_values() -> None:
    same = replace(FULL, model=(("depth", 2), ("width", 8)))
    assert same == FULL
    assert hash(same) == hash(FULL)
    assert copy.deepcopy(FULL) == pickle.loads(pickle.dumps(FULL)) == FULL
    for other in (replace(FULL, eps_scale=0.9), replace(FULL, model=None), replace(FULL, made=None)):
        assert other != FULL
    with pytest.raises(FrozenInstanceError):
        FULL.eps_scale = 1.0  # type: ignore[misc]


# Using one


def test_step_type_at() -> None:
    assert [FULL.step_type_at(t) for t in (0, 500, 999)] == [ATTENTION, ATTN_MLP, NO_CACHE]
    with pytest.raises(TableError, match=r"^timestep: expected one of the table's, \(999, 500, 0\), got 501"):
        FULL.step_type_at(501)


def test_retime_keeps_all_but_the_sampler() -> None:
    moved = FULL.retime(np.array([980, 490, 1]))
    assert moved == replace(FULL, timesteps=(980, 490, 1), sampler=None)
    ddim = SamplerSpec(name="ddim", steps=3, train_steps=1000)
    assert FULL.retime((980, 490, 1), ddim).sampler == ddim
    with pytest.raises(TableError, match=r"^timesteps\[1\]: "):
        FULL.retime([1, 2, 3])


def test_plan_follows_the_table() -> None:
    plan = FULL.plan(SHAPE)
    branches = (Branch.SELF_ATTN, Branch.MLP)
    assert plan.steps == tuple(StepPlan.uniform(t, layered(2, branches)) for t in FULL.step_types)
    assert (plan.timesteps, plan.eps_scale) == (FULL.timesteps, 0.955)


def test_check_accepts_the_model_and_timesteps_the_table_is_for() -> None:
    FULL.check(SHAPE, FULL.timesteps)
    other_model = replace(SHAPE, sizes=(("depth", 4),))
    replace(FULL, model=None).check(other_model, np.array(FULL.timesteps))


def test_another_model_is_refused_with_every_difference() -> None:
    other = replace(SHAPE, sizes=(("depth", 4), ("width", 8), ("heads", 2)))
    for ask in (FULL.plan, lambda shape: FULL.check(shape, FULL.timesteps)):
        with pytest.raises(TableError, match=r"^model: the table is for depth 2, not 4; heads None, not 2; use"):
            ask(other)


@pytest.mark.parametrize("bound", [{"in_channels": 4}, {"in_channels": 8}, {}])
def test_what_a_model_is_given_beside_latents_does_not_matter(bound: dict[str, int], tmp_path: Path) -> None:
    """Files that were bound to it are read as before."""
    replace(FULL, model={"width": 8, "depth": 2, **bound}).save(tmp_path / "t.json")
    for sizes in (SHAPE.sizes, (*SHAPE.sizes, ("in_channels", 4))):
        CacheTable.load(tmp_path / "t.json").check(replace(SHAPE, sizes=sizes), FULL.timesteps)


def test_other_timesteps_are_refused() -> None:
    with pytest.raises(TableError, match=r"^timesteps\[1\]: expected the table's 500, got 490; retime"):
        FULL.check(SHAPE, [999, 490, 0])
    with pytest.raises(TableError, match=r"^timesteps: expected the table's 3 steps, got 4"):
        FULL.check(SHAPE, [999, 500, 250, 0])


# The file


def test_the_file_is_the_documented_one(tmp_path: Path) -> None:
    FULL.save(tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == FULL_FILE
    assert CacheTable.load(str(tmp_path / "table.json")) == FULL


STEP_NAMES = st.sampled_from(get_args(StepName))
COUNTS = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | TEXT
    | st.floats(allow_nan=False, allow_infinity=False)
)
SCORES = st.none() | st.floats(0, allow_infinity=False)


@st.composite
def tables(draw: st.DrawFn) -> CacheTable:
    n = draw(st.integers(1, 5))
    timesteps = sorted(draw(st.sets(COUNTS | st.floats(0, 1e18), min_size=n, max_size=n)), reverse=True)
    per_step = {"min_size": n, "max_size": n}
    made = st.builds(
        Provenance,
        by=TEXT,
        source=TEXT,
        options=st.dictionaries(TEXT, SCALARS, max_size=3),
        errors=st.dictionaries(STEP_NAMES, st.lists(SCORES, **per_step).map(tuple), max_size=2),
        votes=st.dictionaries(STEP_NAMES, st.lists(COUNTS, **per_step).map(tuple), max_size=2),
    )
    sampler = st.builds(
        SamplerSpec,
        name=st.from_regex(r"[a-z][a-z0-9_.+-]{0,5}", fullmatch=True),
        steps=st.just(n),
        train_steps=st.integers(min(int(timesteps[0]) + 1, 2**63 - 1), 2**63 - 1),
    )
    amplify = draw(st.booleans())
    return CacheTable(
        timesteps,
        [NO_CACHE, *draw(st.lists(st.sampled_from(StepType), min_size=n - 1, max_size=n - 1))],
        draw(st.floats(0, 1e300 if amplify else 1, exclude_min=True)),
        sampler=draw(st.none() | sampler) if timesteps[0] < 2**63 - 1 else None,
        model=draw(st.none() | st.dictionaries(TEXT, COUNTS, max_size=3)),
        made=draw(st.none() | made),
        allow_amplify=amplify,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(table=tables())
def test_load_gives_back_what_save_was_given(table: CacheTable, folder: Path) -> None:
    path = folder / "round_trip.json"
    table.save(path)
    loaded = CacheTable.load(path)
    assert loaded == table
    assert repr(loaded) == repr(table)  # also types: 1, 1.0 and True are equal


KEYS = [
    "format",
    "schema",
    "model",
    "model.depth",
    "sampler",
    "sampler.name",
    "sampler.steps",
    "timesteps",
    "step_types",
    "eps_scale",
    "allow_amplify",
    "made",
    "made.by",
    "made.options",
    "made.options.b",
    "made.errors",
    "made.errors.ATTENTION",
    "made.votes.NO_CACHE",
]
VALUES = [
    *(
        "null",
        "true",
        "false",
        "0",
        "1",
        "2",
        "-1",
        "0.5",
        "1.0",
        "1.5",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
    ),
    *(
        "1" * 400,
        "1" * 5000,
        "-0.0",
        "1e-999",
        '""',
        '"NO_CACHE"',
        '"ddpm"',
        r'"\ud800"',
        r'"\u0000"',
        "[]",
        "{}",
    ),
    *("[null]", "[3, 2, 1]", "[999, 500, 0]", "[9, 9, 0]", "[2.0, 1, 0]", "[true, 1, 0]", "[1e999, 1, 0]"),
    *('["NO_CACHE", "MLP", "MLP"]', '["MLP", "MLP", "MLP"]', '[["NO_CACHE"], 1, 2]', "[" * 2000 + "]" * 2000),
    *('{"depth": 1}', '{"name": "ddim", "steps": 3, "train_steps": 1000}', '{"self": 1}', '{"a": {"a": {}}}'),
]


def rewritten(document: object, target: list[str], rename: str | None, value: str | None, twice: bool) -> str:
    """JSON of ``document`` with one key dropped, renamed, given another value's text, or written twice."""
    if not isinstance(document, dict):
        return json.dumps(document)
    lines = []
    for key, item in document.items():
        if [key] != target:
            inner = target[1:] if target[:1] == [key] else []
            lines.append(f"{json.dumps(key)}: {rewritten(item, inner, rename, value, twice)}")
            continue
        if twice:
            lines.append(f"{json.dumps(key)}: {json.dumps(item)}")
        if rename is not None:
            lines.append(f"{json.dumps(rename)}: {json.dumps(item) if value is None else value}")
    return "{" + ", ".join(lines) + "}"


def means(table: CacheTable) -> dict[str, Any]:
    """What a table says, in the terms of its file."""
    return {
        "format": "ebcache-fast.cache-table",
        "schema": 1,
        "model": None if table.model is None else dict(table.model),
        "sampler": None if table.sampler is None else table.sampler.model_dump(),
        "timesteps": table.timesteps,
        "step_types": [t.name for t in table.step_types],
        "eps_scale": table.eps_scale,
        "allow_amplify": table.allow_amplify,
        "made": None if table.made is None else table.made.model_dump(),
    }


def as_read(text: bytes) -> Any:
    """What plain JSON makes of a file, with real numbers real and the parts that ``made`` may lack."""
    document = json.loads(text)
    document["eps_scale"] = document["eps_scale"] / 1
    document["timesteps"] = [int(t) if t == int(t) else t for t in document["timesteps"]]
    if document["made"] is not None:
        document["made"] = {"options": {}, "errors": {}, "votes": {}} | document["made"]
        errors = document["made"]["errors"]
        errors.update({name: [e if e is None else e / 1 for e in row] for name, row in errors.items()})
    return document


def loads_as_written_or_not_at_all(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    try:
        table = CacheTable.load(path)
    except TableError:
        problem_of(path)
        return
    assert json.dumps(means(table), sort_keys=True) == json.dumps(as_read(text), sort_keys=True)


@given(
    key=st.sampled_from(KEYS),
    rename=st.sampled_from([None, "", "same", "timestep", "self", "x\ny", "\ud800"]),
    value=st.none() | st.sampled_from(VALUES),
)
def test_a_changed_key_loads_as_written_or_not_at_all(
    key: str, rename: str | None, value: str | None, folder: Path
) -> None:
    target = key.split(".")
    name = target[-1] if rename == "same" else rename
    text = rewritten(json.loads(FULL_FILE), target, name, value, twice=False)
    loads_as_written_or_not_at_all(folder / "changed.json", text.encode())


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
@pytest.mark.parametrize("key", ["timesteps", "step_types", "eps_scale", "schema", "made.options.b", "made.errors"])
def test_every_odd_value_loads_as_written_or_not_at_all(key: str, value: str, tmp_path: Path) -> None:
    text = rewritten(json.loads(FULL_FILE), key.split("."), key.split(".")[-1], value, twice=False)
    loads_as_written_or_not_at_all(tmp_path / "odd.json", text.encode())


@pytest.mark.parametrize("key", KEYS)
def test_no_key_may_stand_twice(key: str, tmp_path: Path) -> None:
    name = key.rpartition(".")[2]
    path = tmp_path / "twice.json"
    path.write_text(rewritten(json.loads(FULL_FILE), key.split("."), name, None, twice=True))
    assert problem_of(path) == f"{name}: expected once, got 2 times"


@given(start=st.integers(0, len(FULL_FILE)), length=st.integers(0, 9), instead=st.binary(max_size=3))
def test_damaged_bytes_load_as_written_or_not_at_all(start: int, length: int, instead: bytes, folder: Path) -> None:
    whole = FULL_FILE.encode()
    loads_as_written_or_not_at_all(folder / "damaged.json", whole[:start] + instead + whole[start + length :])


@given(length=st.integers(0, len(FULL_FILE.rstrip()) - 1))
def test_a_truncated_file_is_refused(length: int, folder: Path) -> None:
    path = folder / "truncated.json"
    path.write_text(FULL_FILE[:length])
    assert problem_of(path).startswith("expected strict JSON: ")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("format", '"other"', "format: expected 'ebcache-fast.cache-table', got 'other'"),
        ("schema", "2", "sites: missing"),
        ("schema", "3", "schema: expected 1 or 2, got 3; "),
        ("schema", "true", "schema: expected a valid integer, got True"),
        ("sampler.steps", "3.0", "sampler.steps: expected a valid integer, got 3.0"),
        ("sampler", "5", "sampler: "),
        ("timesteps", "[999, 1e999, 0]", "timesteps[1]: expected a number from 0 to 9223372036854775807, got inf"),
        ("timesteps", "[999, 999, 0]", "timesteps[1]: expected less than 999"),
        ("step_types", '["NO_CACHE", "mlp", "MLP"]', "step_types[1]: expected 'NO_CACHE', 'ATTENTION'"),
        ("step_types", "[0, 2, 2]", "step_types[0]: expected 'NO_CACHE'"),
        ("eps_scale", "1e999", "eps_scale: expected a finite number, got inf"),
        ("eps_scale", "NaN", "eps_scale: expected a finite number, got nan"),
        ("eps_scale", "1.036", "eps_scale: expected a number above 0 and at most 1, got 1.036"),
        ("eps_scale", "1" * 400, "eps_scale: "),
        ("allow_amplify", "1", "allow_amplify: expected a valid boolean, got 1"),
        ("made.errors.ATTENTION", "[0, -1, 0]", "made.errors.ATTENTION[1]: "),
        (
            "made.options.b",
            "[]",
            "made.options.b: expected a finite number, a string, a boolean or null, got []",
        ),
    ],
)
def test_the_message_names_the_field(key: str, value: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(rewritten(json.loads(FULL_FILE), key.split("."), key.split(".")[-1], value, twice=False))
    assert problem_of(path).startswith(problem)


@pytest.mark.parametrize("key", [key for key in KEYS if key.partition(".")[0] != "made" and key != "model.depth"])
def test_no_key_may_be_missing_or_misspelt(key: str, tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    document = json.loads(FULL_FILE)
    path.write_text(rewritten(document, key.split("."), None, None, twice=False))
    assert problem_of(path) == f"{key}: missing; every key must be there"
    path.write_text(json.dumps(document | {"colour": 1}))
    assert problem_of(path) == "colour: unknown key; leave it out"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "expected strict JSON: "),
        (b"[1]", "expected a JSON object, got [1]"),
        (b"\xff\xfe{\x00}\x00", "expected strict JSON: "),
        (b"\xef\xbb\xbf" + FULL_FILE.encode(), "expected strict JSON: "),
        (FULL_FILE.encode() + b"{}", "expected strict JSON: Extra data"),
        (b"[" * 200_000, "expected strict JSON: "),
        (b" " * table_file.MAX_BYTES + b"{}", "expected a table of at most "),
        (b"\x80\x04\x95pickle", "expected strict JSON: "),
    ],
)
def test_what_is_no_table_at_all(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    assert problem_of(path).startswith(problem)


def test_what_can_not_be_read(tmp_path: Path) -> None:
    assert problem_of(tmp_path) == "can't be read: Is a directory"
    assert problem_of(tmp_path / "none.json") == "can't be read: No such file or directory"
    with pytest.raises(TableError, match="can't be read: embedded null byte"):
        CacheTable.load("a\0b")


# Writing it


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    FULL.save(path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TableError, match=r"table\.json: can't be written: No space left on device; "):
        replace(FULL, eps_scale=0.5).save(path)
    assert CacheTable.load(path) == FULL
    assert os.listdir(tmp_path) == ["table.json"]


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        FULL.save(tmp_path / "table.json")
    assert os.listdir(tmp_path) == []


def test_saving_replaces_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    FULL.save(path)
    half = replace(FULL, eps_scale=0.5)
    half.save(path)
    assert CacheTable.load(path) == half
    assert os.listdir(tmp_path) == ["table.json"]


def test_where_a_table_can_not_go(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "none" / "t.json", "No such file or directory"),
        (tmp_path / "file" / "t.json", "Not a directory"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "a\0b", "embedded null byte"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        with pytest.raises(TableError, match=f"can't be written: .*{reason}"):
            FULL.save(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


# Named tables


def linspace_timesteps(T: int) -> tuple[int, ...]:
    """The DiT repository's respacing "T" of 1000 steps, first executed first."""
    return tuple(round(k * 999 / (T - 1)) for k in range(T - 1, -1, -1))


def eb_cache_released(T: int) -> list[StepType]:
    """Full at the first step, every 3rd at high noise, every 2nd in the middle, always at low noise."""
    full = [
        i == T - 1 or i < 0.2 * T or (T - 1 - i) % (3 if i > 0.8 * T else 2 if i > 0.4 * T else 1) == 0
        for i in range(T - 1, -1, -1)
    ]
    return [NO_CACHE if f else ATTN_MLP for f in full]


def fora(interval: int, T: int) -> list[StepType]:
    return [NO_CACHE if i == T - 1 or i % interval == 0 else ATTN_MLP for i in range(T - 1, -1, -1)]


def computing(steps: set[int], T: int) -> list[StepType]:
    return [NO_CACHE if i in steps else ATTN_MLP for i in range(T)]


NAMED = {
    "eb-cache-released-50": ("ddpm", eb_cache_released(50)),
    "fora-2-50": ("ddpm", fora(2, 50)),
    "fora-3-50": ("ddpm", fora(3, 50)),
    "fora-4-50": ("ddpm", fora(4, 50)),
    "smoothcache-dit-xl2-ddim50-0.08": ("ddim", computing({0, 3, 5, *range(7, 50)}, 50)),
    "smoothcache-dit-xl2-ddim50-0.18": ("ddim", computing({0, 4, 7, *range(10, 50, 2), 49}, 50)),
    "smoothcache-dit-xl2-ddim70-0.08": ("ddim", computing({0, 4, 7, *range(10, 70, 2), 69}, 70)),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_tables_follow_their_rules(name: str, tmp_path: Path) -> None:
    sampler, step_types = NAMED[name]
    table = CacheTable.named(name)
    steps = len(step_types)
    assert table.step_types == tuple(step_types)
    assert table.timesteps == linspace_timesteps(steps)
    assert table.sampler == SamplerSpec(name=sampler, steps=steps, train_steps=1000)
    assert (table.eps_scale, table.allow_amplify, table.model) == (1.0, False, None)
    assert table.made is not None
    assert "arXiv" in table.made.by
    assert table.made.options["model"] == "DiT-XL/2"


def test_the_released_table_says_what_paper_and_release_scale_by() -> None:
    made = CacheTable.named("eb-cache-released-50").made
    assert made is not None
    assert made.options["paper_eps_scale"] == 0.955
    assert made.options["released_eps_scale"] == pytest.approx(1 / 0.965)


def test_every_named_table_loads_and_is_laid_out_as_saved(tmp_path: Path) -> None:
    assert set(NAMED) <= set(named_tables())
    for name in named_tables():
        CacheTable.named(name).save(tmp_path / "again.json")
        shipped = Path(cache_table.__file__).parents[1] / "assets" / "tables" / f"{name}.json"
        assert (tmp_path / "again.json").read_text() == shipped.read_text()


@pytest.mark.parametrize("name", ["", "fora", "../tables/fora-2-50", "fora-2-50.json", "/etc/passwd"])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(TableError, match=r"^name: expected one of eb-cache-released-50, .*fora-2-50, .* got '"):
        CacheTable.named(name)
