"""A file is replaced whole or not at all, whatever fails, and nothing is left lying about."""

import errno
import os
from pathlib import Path

import pytest

from ebcache_fast.errors import JobError
from ebcache_fast.plan.files import make_folder, make_room, replacing


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_to_write(path: Path, text: str, fault: BaseException) -> None:
    with replacing(path) as partial:
        partial.write_text(text)
        raise fault


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("old", "new"):
        with replacing(path) as partial:
            assert partial.parent == path.parent  # else the last step would be a copy, which can be seen half done
            partial.write_text(text)
        assert path.read_text() == text
    assert names(tmp_path) == ["a.txt"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"


@pytest.mark.parametrize("fault", [ValueError("odd"), KeyboardInterrupt(), GeneratorExit(), full_disk()])
def test_a_failing_writer_leaves_what_was_there(fault: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    expected = JobError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected):
        fail_to_write(path, "ha", fault)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failing_writer_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(JobError):
        fail_to_write(tmp_path / "a.txt", "ha", full_disk())
    assert names(tmp_path) == []


def test_an_os_error_names_the_path_the_reason_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(JobError) as caught, replacing(path):
        raise full_disk()
    assert str(caught.value) == f"{path}: can't be written: No space left on device; choose another path"
    with pytest.raises(JobError, match=r"a\.txt: can't be written: short write; "), replacing(path):
        raise OSError("short write")  # such as zipfile raises, without a number


def test_a_place_that_can_t_hold_a_file(tmp_path: Path) -> None:
    """Cleaning up must not fail there either, and hide the reason."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for place, reason in (
        ("missing/a.txt", "No such file or directory"),
        ("file/a.txt", "Not a directory"),
        ("folder", "not a regular file"),
        ("n" * 300, "File name too long"),
    ):
        with pytest.raises(JobError, match=reason) as caught, replacing(tmp_path / place) as partial:
            partial.write_text("new")
        assert str(tmp_path / place) in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []


def test_two_writers_don_t_share_a_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second, and longer")
        assert path.read_text() == "second, and longer"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    make_folder(folder)
    make_folder(folder)
    assert folder.is_dir()


@pytest.mark.parametrize("place", ["file", "file/b"])
def test_a_file_in_the_place_of_a_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=rf"{place} can't be made: .*; choose another folder"):
        make_folder(tmp_path / place)


def test_a_folder_that_can_t_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by a stand-in, because permissions don't bind root."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("ebcache_fast.plan.files.TemporaryFile", refused)
    with pytest.raises(JobError, match=f"{tmp_path} is not writable: Permission denied; choose another folder"):
        make_folder(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has /proc")
def test_a_folder_that_takes_no_file_of_anybody_s() -> None:
    with pytest.raises(JobError, match=r"/proc is not writable: .*; choose another folder"):
        make_room(Path("/proc/t.json"))


def test_what_is_no_regular_file_is_refused_before_any_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path(os.devnull)):
        with pytest.raises(JobError, match=f"{path} can't be written: .* not a regular file; choose another path"):
            make_room(path)


def test_room_for_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    make_room(path)
    assert path.parent.is_dir()
    assert not path.exists()
    path.touch()
    make_room(path)  # an old file will be replaced
    with pytest.raises(JobError, match="new is a folder; name a file in it"):
        make_room(path.parent)
    with pytest.raises(JobError, match=r"a\.json can't be made"):
        make_room(path / "b.json")
