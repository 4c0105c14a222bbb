"""What commands print where: on a terminal, into a file, to nobody, onto a full device, and when memory ends."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from ebcache_fast.apps import cli, console
from ebcache_fast.plan import StepType
from ebcache_fast.plan.table import CacheTable

LINES = ("info", "table show fora-2-50", "table check fora-2-50", "--help", "sample --help", "table show --help")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")


def code_of(line: str) -> int:
    """How a command line ends; rich and the parser end the program themselves."""
    try:
        return cli.main(line.split())
    except SystemExit as stop:
        return int(stop.code or 0)


def printing_to(target: str | int, line: str) -> int:
    """How a command line ends whose output goes there; the interpreter's own last flush has nothing left to fail at."""
    with open(target, "w") as stream, redirect_stdout(stream):
        return code_of(line)


@pytest.mark.parametrize("line", LINES)
def test_output_that_nobody_reads_ends_the_command_quietly(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As after head -1."""
    reader, writer = os.pipe()
    os.close(reader)
    assert printing_to(writer, line) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["info", "table show fora-2-50", "table check fora-2-50"])
def test_a_closed_output_takes_nothing(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``>&-``, where Python has no stdout at all."""
    monkeypatch.setattr(sys, "stdout", None)
    assert code_of(line) == 0


@needs_dev_full
@pytest.mark.parametrize("line", LINES)
def test_output_onto_a_full_device_is_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printing_to("/dev/full", line) == 2
    assert capsys.readouterr().err == (
        "ebcache-fast: output: No space left on device; make room, or choose another place\n"
    )


@needs_dev_full
@pytest.mark.parametrize(
    "line",
    [
        "table import theirs.npy --steps 4 --out /dev/full",
        "calibrate --samples 1 --num-sampling-steps 4 --out /dev/full",
        "calibrate --samples 1 --num-sampling-steps 4 --out t.json --progress-file /dev/full",
        "sample --num-samples 1 --num-sampling-steps 1 --sample-dir /dev/full",
        "compare --samples 32 --num-sampling-steps 1 --methods no-cache --out /dev/full",
        "profile --num-samples 1 --out /dev/full",
        "demo --samples 32 --out /dev/full",
    ],
)
def test_a_full_device_in_a_file_s_place_is_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("theirs.npy", np.array([0, 2, 2, 0]))
    assert code_of(line) == 2
    err = capsys.readouterr().err
    assert err.startswith("ebcache-fast: /dev/full")
    assert err.count("\n") == 1


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail


def error_of(function: Callable[[], object]) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        function()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        error_of(lambda: torch.zeros(2**45)),
        error_of(lambda: np.zeros(2**50)),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand a page of advice"),
        MemoryError(),
    ],
    ids=["torch", "numpy", "cuda", "python"],
)
def test_the_end_of_memory_is_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "print_info", raising(error))
    assert cli.main(["info"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"ebcache-fast: out of memory \(.+\); run fewer samples at once, or a smaller model", line)


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "print_info", raising(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cli.main(["info"])


def test_what_an_encoding_lacks_is_no_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(console, "print_info", lambda: print("1 ± 2"))
        assert cli.main(["info"]) == 0
    assert (tmp_path / "out").read_text() == "1 ? 2\n"


# ------------------------------------------------------------------------------------------------- tables

EVERY_TYPE = CacheTable(range(len(StepType))[::-1], StepType)
TERMINAL = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TERM", "COLORTERM")


def show(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TERMINAL:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console.print_table(EVERY_TYPE)


@pytest.mark.parametrize(
    "environment", [{}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, {"TTY_COMPATIBLE": "1", "TERM": "dumb"}]
)
def test_a_strip_without_colours_tells_every_type_apart(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show(environment, monkeypatch)
    strip, legend, *_ = ESCAPES.sub("", capsys.readouterr().out).splitlines()
    assert len(set(strip)) == len(StepType)
    assert strip.isascii()
    assert f"{strip[2]} {StepType(2).name} 1  {strip[3]} {StepType(3).name} 1" in legend


def test_a_strip_on_a_terminal_is_coloured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show({"FORCE_COLOR": "1", "TERM": "xterm-256color"}, monkeypatch)
    strip, legend, *_ = capsys.readouterr().out.splitlines()
    assert len(set(re.findall(r"\x1b\[([0-9;]*)m█", strip))) == len(StepType)
    assert ESCAPES.sub("", legend).startswith("NO_CACHE 1")


@pytest.mark.parametrize("name", ["mine.txt", "mine", "mine.cache-table", "fora-2-50", "a folder/mine.txt"])
def test_a_file_is_a_table_whatever_its_suffix(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a folder").mkdir()
    table = CacheTable([30, 20, 0], [StepType.NO_CACHE, StepType.MLP, StepType.ATTN_MLP])
    table.save(name)
    assert cli.main(["table", "show", name]) == 0
    assert "3 steps, timesteps 30 to 0" in capsys.readouterr().out
    assert cli.main(["sample", "--table", name, "--text", "A"]) == 0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.txt", r"table: expected a file, or one of .*fora-2-50.*, got 'none\.txt'"),
        ("there/none.txt", "there/none.txt: can't be read: No such file"),
        ("a folder", "expected a file, or one of .*, got 'a folder'"),
        ("n" * 300, "expected a file, or one of "),
        ("theirs.npy", r"theirs\.npy is a \.npy array; ebcache-fast table import makes a table of it"),
        ("theirs.json", r"theirs\.json is a \.npy array"),
        ("words.txt", r"words\.txt: expected strict JSON"),
    ],
)
def test_what_is_no_table_is_one_line(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a folder").mkdir()
    Path("words.txt").write_text("NO_CACHE, ATTN_MLP")
    for path in ("theirs.npy", "theirs.json"):
        with open(path, "wb") as file:
            np.save(file, np.array([0, 2, 2, 0]))
    assert cli.main(["table", "show", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(problem, line), line


@pytest.mark.parametrize("name", ["theirs.npy", "theirs.dat", "theirs.json", "list.json"])
def test_what_is_imported_says_itself_what_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open(name, "wb") as file:
        if name == "list.json":
            file.write(b'{"attn": [1, 0, 1], "mlp": [1, 0, 1]}')
        else:
            np.save(file, np.array([0, 2, 0]))
    assert cli.main(["table", "import", name, "--steps", "3", "--out", "ours.json"]) == 0
    assert CacheTable.load("ours.json").step_types[1].name.endswith("ATTN_MLP")
