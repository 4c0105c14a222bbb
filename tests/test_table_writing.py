"""A table's file as it is written: whole, or as it was before."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from full_table import FULL

from ebcache_fast.errors import TableError
from ebcache_fast.plan.table import CacheTable


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
