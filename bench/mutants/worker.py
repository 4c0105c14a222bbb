"""A copy of the tree with the warm process that runs tests in it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.mutants.errors import MutationError
from bench.mutants.tree import copy_tree

WARM = Path(__file__).with_name("warm.py")
# The interpreter on one thread, wherever this runs; no options of a pytest run that this is part of.
SETTINGS = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
NOT_PASSED_ON = {"PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTHONPATH"}


@dataclass(frozen=True)
class Run:
    """How a run of tests ended."""

    status: int  # pytest's exit status, or minus the signal that ended it
    seconds: float
    tail: str  # the end of its output
    killer: str | None  # the test that failed, or that ran as the process ended
    tests: Mapping[str, float]  # seconds of each test that ran

    @property
    def timed_out(self) -> bool:
        return self.status in (-signal.SIGPROF, -signal.SIGALRM)


class Worker:
    """Runs tests in its own copy of the tree."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
        path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WARM)],  # -P: this folder stays off the path, the copy is on it
            cwd=tree,
            env=environment | SETTINGS | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: Sequence[str], seconds: Mapping[str, float], otherwise: float) -> Run:
        """Run test files until the first failure: tests in ``seconds`` first, in its order, each so long at most."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request: dict[str, Any] = {"tests": tests, "seconds": [*seconds.items()], "otherwise": otherwise}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return Run(**json.loads(self._process.stdout.readline()))
        except (BrokenPipeError, json.JSONDecodeError):
            status = self._process.wait()
            raise MutationError(
                f"the process that runs tests ended, status {status}; its last words are above"
            ) from None

    @contextmanager
    def replaced(self, file: str, source: str) -> Iterator[None]:
        """Another source in the copy, for a while."""
        path = self.tree / file
        original = path.read_text()
        path.write_text(source)
        try:
            yield
        finally:
            path.write_text(original)

    def stop(self) -> None:
        """End the process, and with it a run that waits for it; MutationError there."""
        self._process.terminate()

    def close(self) -> None:
        """End the process and wait until it has."""
        self.stop()
        self._process.communicate()


@contextmanager
def workers(root: Path, folder: Path, count: int) -> Iterator[list[Worker]]:
    """So many workers on copies of ``root``, made in ``folder``."""
    staff: list[Worker] = []
    try:
        for k in range(count):
            original = staff[0].tree if staff else root  # which may change meanwhile
            staff.append(Worker(copy_tree(original, folder / str(k))))
        yield staff
    finally:
        for worker in staff:
            worker.close()
