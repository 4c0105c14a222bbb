"""Runs tests in processes forked from this one, which imports every library that it has seen one of them import.

Started in a copy of the tree (see `worker`). A request is a line of JSON on standard input:
``{"tests": [...], "seconds": [[test, limit], ...], "otherwise": limit}``; tests run in the order of "seconds", then the
rest. The reply is a line of JSON on standard output, the fields of `worker.Run`. Nothing of the tree itself is imported
here: each child reads it as it is then.
"""

import argparse
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import pytest

WAITING = 20  # seconds by the clock that a second of processor time may take ...
PATIENCE = 300  # ... or so many altogether, on a machine that has much else to do
TAIL = 2000  # characters of a run's output that are kept
INTERNAL_ERROR = 3  # pytest's


class Watch:
    """A plugin: puts tests that are likely to fail first, ends the process when one takes too long, notes times."""

    def __init__(self, seconds: Iterable[tuple[str, float]], otherwise: float, notes: IO[str]) -> None:
        self.limits = dict(seconds)
        self.places = {test: place for place, test in enumerate(self.limits)}
        self.otherwise = otherwise
        self.notes = notes
        self.killer: str | None = None
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.places.get(item.nodeid, len(self.places)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.allow(self.limits.get(item.nodeid, self.otherwise))
        self.note(killer=item.nodeid)  # should the process not outlive it
        result = yield
        self.allow(self.otherwise)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.killer = report.nodeid

    def note(self, killer: str | None, libraries: Sequence[str] = ()) -> None:
        """Say in the notes how things stand."""
        self.notes.seek(0)
        self.notes.truncate()
        json.dump({"killer": killer, "tests": self.seconds, "libraries": libraries}, self.notes)
        self.notes.flush()

    def allow(self, seconds: float) -> None:
        """Let a signal end this process, even within C code, unless this is called again in so much processor time.

        A busy machine takes none of it; the wall clock is for what waits without working.
        """
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, max(WAITING * seconds, PATIENCE))


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    signal.signal(signal.SIGTERM, leave)
    for line in sys.stdin:
        reply = run(json.loads(line))
        learn(reply.pop("libraries"))
        print(json.dumps(reply), file=replies, flush=True)


def leave(number: int, _: object) -> None:
    """End, once, and not without the child; a handler of signals."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def learn(libraries: Iterable[str]) -> None:
    """Import what a child had to, so that the next ones have it."""
    new = [name for name in libraries if name not in sys.modules]
    for name in new:
        with suppress(Exception):  # some modules can't be imported by themselves
            import_module(name)
    if new:
        gc.collect()
        gc.freeze()  # forks share what is never looked through for garbage


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and say how it went."""
    with tempfile.TemporaryFile("w+", errors="replace") as log, tempfile.TemporaryFile("w+") as notes:
        watch = Watch(request["seconds"], request["otherwise"], notes)
        watch.note(killer=None)
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            _be_the_child(request, watch, log)
        with suppress(OSError):
            os.setpgid(child, child)  # whoever comes first, it or the child itself
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what the tests started and left; they themselves, if this one ends
        log.seek(0)
        notes.seek(0)
        seconds = time.perf_counter() - started
        return {"status": status, "seconds": seconds, "tail": log.read()[-TAIL:], **json.load(notes)}


def libraries() -> list[str]:
    """The modules that this process has loaded from files elsewhere than in the tree."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return [name for name, file in files.items() if file and not Path(file).is_relative_to(Path.cwd())]


def _be_the_child(request: dict[str, Any], watch: Watch, log: IO[str]) -> None:
    status = INTERNAL_ERROR
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # mutants crash a lot
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory, this process goes and no other
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        watch.allow(request["otherwise"])
        options = ["-m", "", "-q", "-x", "-p", "no:cacheprovider"]  # the slow ones too
        status = int(pytest.main([*options, *request["tests"]], plugins=[watch]))
        watch.note(watch.killer, libraries())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # no tidying up: memory that a mutant has spoiled could end it another way


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    with suppress(KeyboardInterrupt):
        serve()
