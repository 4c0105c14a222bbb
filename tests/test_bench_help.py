"""Every command of bench/ says what it does when asked, does nothing else then, and refuses words it does not know."""

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from constants import ROOT

GUARD = 'if __name__ == "__main__":'
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "bench").rglob("*.py")
    if GUARD in path.read_text()
)


def test_there_are_such_commands() -> None:
    assert {"bench.report", "bench.mutants", "bench.rivals", "bench.launches"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # where a test has imported it before
@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--frobnicate", 2)])
def test_help_is_all_that_help_does(command: str, word: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("something was written")

    for name in ("write_text", "write_bytes", "mkdir", "unlink"):
        monkeypatch.setattr(Path, name, never)
    monkeypatch.setattr(sys, "argv", [command, word])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as stopped, redirect_stdout(out), redirect_stderr(err):
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    assert stopped.value.code == code
    assert "usage: " in (err if code else out).getvalue()
