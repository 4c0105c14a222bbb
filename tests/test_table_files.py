"""A table's file as it is read: as it was written, or not at all."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from constants import NO
from full_table import FULL
from hypothesis import given
from hypothesis import strategies as st

from ebcache_fast.errors import TableError
from ebcache_fast.plan import StepType, table_file
from ebcache_fast.plan.table import CacheTable, Provenance, SamplerSpec
from ebcache_fast.plan.table_schema import StepName

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
        [NO, *draw(st.lists(st.sampled_from(StepType), min_size=n - 1, max_size=n - 1))],
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
