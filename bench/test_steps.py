"""How long each type of step and whole trajectories take: operation by operation, a graph a step type, one graph.

    pytest bench --benchmark-only -k "steps or trajectory" [--benchmark-json FILE]
    pytest bench --benchmark-only -k "steps and 256px"

On a GPU: DiT-XL/2 in bfloat16 at 256 and 512 px, random weights, B = 1, 8 and 32 guided samples. Every figure is device
time between events that the stream records, of runs of 48 or 50 steps that take turns. A step's is the median of its
like within a run, each behind a NO_CACHE step, so that the host is ahead unless it is the one that is slow. A
trajectory's is its loop's; ``with_setup_us`` adds modulation and noise. The floor is that of each dispatch's compulsory
bytes and products by the ceilings that the same run measured. On a CPU the bundled model runs, operation by operation,
so that none of this can rot: no claim.
"""

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.ceilings import Ceilings
from bench.conftest import Replayed
from bench.step_cases import KINDS, TABLES, Measured, Race, Size, contenders_of, model_of, race

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not there; install the extra bench")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ROUNDS = 15 if ON_GPU else 3
SECONDS = 2.0 if ON_GPU else 0.1  # of rounds of one contender, about
SIZES = (
    tuple(Size(f"DiT-XL/2 {px} px", px, samples) for px in (256, 512) for samples in (1, 8, 32))
    if ON_GPU
    else (Size("letters", 0, 1),)
)
Case = tuple[str, str, Size]  # the table, what is timed of it, the size


@pytest.fixture(scope="session")
def step_race(ceilings: Ceilings) -> Race:
    """`race`, once for all contenders and kinds of step of a table and size; only the latest is kept."""

    @lru_cache(maxsize=1)
    def run(table: str, size: Size) -> dict[tuple[str, str], Measured]:
        if ON_GPU:
            torch.cuda.empty_cache()
        model = model_of(size.px, DEVICE, DTYPE)
        return race(table, size, model, contenders_of(table, DEVICE), ceilings, SECONDS, ROUNDS)

    return run


def parameters(tables: Sequence[str]) -> list[Any]:
    """Every contender of every kind of step, or of every trajectory; small sizes first."""
    return [
        pytest.param((table, kind, size), contender, id=name_of(kind, size, contender))
        for size in SIZES
        for table in tables
        for kind in (KINDS if table == "steps" else (table,))
        for contender in contenders_of(table, DEVICE)
    ]


def name_of(kind: str, size: Size, contender: str) -> str:
    px = f"{size.px}px" if size.px else size.label
    return re.sub(r"[^\w.-]+", "_", f"{kind}-{px}-B{size.samples}-{contender}")


@pytest.mark.parametrize(("case", "contender"), parameters(["steps"]))
def test_steps(
    case: Case, contender: str, step_race: Race, ceilings: Ceilings, clock: Replayed, benchmark: Any
) -> None:
    keep(case, contender, step_race, ceilings, clock, benchmark)


@pytest.mark.parametrize(("case", "contender"), parameters([name for name in TABLES if name != "steps"]))
def test_trajectory(
    case: Case, contender: str, step_race: Race, ceilings: Ceilings, clock: Replayed, benchmark: Any
) -> None:
    keep(case, contender, step_race, ceilings, clock, benchmark)


def keep(case: Case, contender: str, step_race: Race, ceilings: Ceilings, clock: Replayed, benchmark: Any) -> None:
    """Measure, unless that was done with another contender, and hand it to pytest-benchmark."""
    table, kind, size = case
    measured = step_race(table, size)[contender, kind]
    benchmark.group = f"{kind}, {size.label}, B={size.samples}"
    benchmark.extra_info.update(figures(case, contender, measured, ceilings))
    rounds = iter(measured.seconds)
    benchmark.pedantic(lambda: clock.advance(next(rounds)), rounds=len(measured.seconds))


def figures(case: Case, contender: str, measured: Measured, ceilings: Ceilings) -> dict[str, Any]:
    """What is kept of a contender: its median and quartiles, and the share of what the device can do."""
    table, kind, size = case
    low, median, high = statistics.quantiles(measured.seconds, n=4, method="inclusive")
    setup = {"with_setup_us": statistics.median(measured.whole) * 1e6} if measured.whole else {}
    return {
        "what": f"{'step' if table == 'steps' else 'trajectory'}: {kind}",
        "model": size.label,
        "samples": size.samples,
        "dtype": str(DTYPE).removeprefix("torch."),
        "contender": contender,
        "median_us": median * 1e6,
        "quartiles_us": [low * 1e6, high * 1e6],
        "rounds": len(measured.seconds),
        "bytes": measured.work.bytes,
        "flops": measured.work.flops,
        "floor_us": measured.floor * 1e6,
        "share_of_ceiling": measured.floor / median,
        "ceilings": asdict(ceilings),
    } | setup
