"""What every suite of benchmarks stores with its results: the GPU's state and the versions, before and after.

These are hooks of pytest-benchmark, optional so that collecting without it skips instead of failing.
"""

from typing import Any

import pytest

from bench.telemetry import telemetry

STARTED = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    """Look at the machine before anything runs."""
    config.stash[STARTED] = telemetry()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add the machine's state at the start and at the end."""
    output_json["telemetry"] = {"start": config.stash[STARTED], "end": telemetry()}
