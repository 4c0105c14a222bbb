"""One stage of a suite: a command with a limit of time, and how it ended."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTESTS_OWN = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_")  # of the run that a suite is tested by
GRACE = 20  # seconds to write down what there is, once the time is up: pytest-xdist waits 10 for busy workers
KEPT = 60_000  # characters of output, from its end


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    status: str  # passed, failed, skipped, out of time
    why: str = ""  # if not passed
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    def with_found(self, more: dict[str, Any]) -> "Outcome":
        return replace(self, found=self.found | more)


def run(command: Sequence[str], seconds: float, **environment: str) -> Outcome:
    """Run a command in the repository for at most so long; at the end of it, it is asked to write its results."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PYTESTS_OWN)}
    environ = inherited | {"PYTHONPATH": path} | environment
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)  # pytest writes its reports then
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
        output.seek(0)
        said = {"output": output.read()[-KEPT:]}
    if status is None:
        return Outcome("out of time", "stopped; what was done until then is kept", found=said)
    return Outcome("failed", f"exit status {status}", found=said) if status else Outcome("passed")
