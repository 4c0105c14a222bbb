"""A table's file as it is written: whole, or as it was before."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from constants import ATTENTION, ATTN_MLP, NO

from ebcache_fast.errors import TableError
from ebcache_fast.plan.table import CacheTable, Provenance, SamplerSpec

FULL = CacheTable(
    timesteps=[999, 500, 0],
    step_types=[NO, ATTN_MLP, ATTENTION],
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


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test pulls the plug, so none need wait until the disk has everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


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
