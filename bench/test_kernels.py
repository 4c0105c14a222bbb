"""How long each kernel takes at DiT-XL/2's shapes, beside what else computes the same.

    pytest bench --benchmark-only -k kernels [--benchmark-json FILE]      all of it; most of the time torch.compile's
    pytest bench --benchmark-only -k "kernels and not compile"            without torch.compile
    pytest bench --benchmark-only -k "kernels and 256px and B1"           one shape

On a GPU: bfloat16, 256 and 512 px, B = 1, 8 and 32 guided samples; Triton, torch eager, torch.compile and, where there
is one, the library's own. Contenders of one kernel take turns; each round replays a CUDA graph of calls over operands
in rotation, larger than the L2 cache together, and is timed by device events. The table shows seconds a call by round;
``extra_info`` has achieved rates and their share of the ceilings that the same run measured. On a CPU the references
run once over, at tiny sizes, so that none of this can rot: no claim.
"""

import re
import statistics
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch

from bench.ceilings import Ceilings
from bench.conftest import Replayed
from bench.kernel_cases import CALLS
from bench.kernel_contenders import (
    COMPILED,
    CONTENDERS,
    LIBRARY,
    bound,
    contenders_of,
    interleaved,
    rotation,
    timer,
    work,
)
from bench.kernel_operands import LETTERS, XL_256, XL_512, KernelOperands, ModelSizes

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not there; install the extra bench")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ROUNDS = 15 if ON_GPU else 3
SHAPES: tuple[tuple[str, ModelSizes, int], ...] = (
    tuple((f"{px}px", model, samples) for px, model in ((256, XL_256), (512, XL_512)) for samples in (1, 8, 32))
    if ON_GPU
    else (("letters", LETTERS, 1),)
)
OPTIONAL = {COMPILED}.union(*LIBRARY.values())  # may lack what they need here: skipped then, with the reason


class Case(NamedTuple):
    """One kernel at one size."""

    kernel: str
    model: ModelSizes
    samples: int


Outcome = list[float] | str  # seconds a call by round, or why there are none
Race = Callable[[Case, tuple[str, ...]], dict[str, Outcome]]


def run_race(case: Case, contenders: tuple[str, ...]) -> dict[str, Outcome]:
    """Time the contenders of one case in turns; one that can't run does not stop the others."""
    sets = rotation(work(*case, DTYPE.itemsize).bytes, DEVICE)
    operands = (KernelOperands(case.model, case.samples, DTYPE, DEVICE) for _ in range(sets))
    calls = [bound(case.kernel, one) for one in operands]
    timers, outcomes = {}, dict[str, Outcome]()
    for name in contenders:
        try:
            timers[name] = timer(CONTENDERS[name](calls[0].operation), calls, DEVICE)
        except Exception as error:  # whatever a compiler or a library may raise
            outcomes[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"  # text: it keeps no memory
    return outcomes | interleaved(ROUNDS, timers)


@pytest.fixture(scope="session")
def race() -> Race:
    """`run_race`, once for all contenders of a case; only the latest is kept."""
    return lru_cache(maxsize=1)(run_race)


def chosen(request: pytest.FixtureRequest, case: Case) -> tuple[str, ...]:
    """The contenders of a case that this session runs."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return tuple(one["contender"] for one in params if one.get("case") == case)


def parameters() -> Iterator[Any]:
    """Every contender of every kernel, small sizes first, contenders of a case side by side."""
    for label, model, samples in SHAPES:
        for kernel in CALLS:
            for contender in contenders_of(kernel, DEVICE):
                called = kernel.replace("steps", "")  # -k steps chooses bench/test_steps.py
                name = f"{called}-{label}-B{samples}-{contender}"
                yield pytest.param(Case(kernel, model, samples), contender, id=re.sub(r"[^\w.-]+", "_", name))


@pytest.mark.parametrize(("case", "contender"), list(parameters()))
def test_kernels(
    case: Case,
    contender: str,
    race: Race,
    ceilings: Ceilings,
    request: pytest.FixtureRequest,
    clock: Replayed,
    benchmark: Any,
) -> None:
    outcome = race(case, chosen(request, case))[contender]
    if isinstance(outcome, str):
        benchmark.skipped = True
        if contender not in OPTIONAL:
            pytest.fail(outcome, pytrace=False)
        pytest.skip(f"{contender} does not run here: {outcome.splitlines()[0]}")
    benchmark.group = f"{case.kernel}, {case.model.name}, B={case.samples}"
    benchmark.extra_info.update(figures(case, contender, outcome, ceilings))
    rounds = iter(outcome)
    benchmark.pedantic(lambda: clock.advance(next(rounds)), rounds=len(outcome))


def figures(case: Case, contender: str, seconds: list[float], ceilings: Ceilings) -> dict[str, Any]:
    """What is kept of a contender: its median and quartiles, rates, and the share of what the device can do."""
    least = work(*case, DTYPE.itemsize)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "kernel": case.kernel,
        "model": case.model.name,
        "samples": case.samples,
        "dtype": str(DTYPE).removeprefix("torch."),
        "contender": contender,
        "median_us": median * 1e6,
        "quartiles_us": [low * 1e6, high * 1e6],
        "rounds": len(seconds),
        "bytes": least.bytes,
        "flops": least.flops,
        "gb_per_s": least.bytes / median / 1e9,
        "tflop_per_s": least.flops / median / 1e12,
        "bound_by": ceilings.binding(least),
        "share_of_ceiling": ceilings.floor_seconds(least) / median,
        "ceilings": asdict(ceilings),
    }
