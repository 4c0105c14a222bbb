"""What every suite of benchmarks shares: the GPU's state and the versions, stored with its results; clock and ceilings.

The hooks of pytest-benchmark are optional, so that collecting without it skips instead of failing.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.telemetry import telemetry

STARTED = pytest.StashKey[dict[str, Any]]()
CEILING_ROUNDS = 15


@dataclass
class Replayed:
    """A clock that goes on by durations measured before: pytest-benchmark's own would read the host's time."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def pytest_configure(config: pytest.Config) -> None:
    """Look at the machine before anything runs."""
    config.stash[STARTED] = telemetry()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add the machine's state at the start and at the end."""
    output_json["telemetry"] = {"start": config.stash[STARTED], "end": telemetry()}


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """This device's, in this run."""
    return measure_ceilings(torch.device("cuda" if torch.cuda.is_available() else "cpu"), CEILING_ROUNDS)


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> Replayed:
    """The clock that `benchmark` reads; it must come before it."""
    replayed = Replayed()
    request.node.add_marker(pytest.mark.benchmark(timer=replayed, warmup=False))
    return replayed
