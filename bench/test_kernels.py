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
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.kernel_cases import CALLS
from bench.kernel_contenders import (
    COMPILED,
    CONTENDERS,
    LIBRARY,
    BoundCall,
    Work,
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


@dataclass
class Replayed:
    """A clock that goes on by durations measured before: pytest-benchmark's own would read the host's time."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


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


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches in the same run: medians."""

    bytes_per_second: float  # of a copy, read and written
    flops_per_second: float  # of a bfloat16 product of two square matrices

    def floor_seconds(self, least: Work) -> float:
        """The time under which nothing that does this work can come."""
        return max(least.bytes / self.bytes_per_second, least.flops / self.flops_per_second)

    def binding(self, least: Work) -> str:
        """Which of the two sets the floor."""
        by_memory = least.bytes / self.bytes_per_second >= least.flops / self.flops_per_second
        return "memory" if by_memory else "matrix products"


def measure_ceilings(device: torch.device, rounds: int) -> Ceilings:
    """Copy 4 GiB and multiply 8192^3 on a GPU, far less on a CPU; random data, because zeros run faster."""
    elements, side = (2**31, 8192) if device.type == "cuda" else (2**22, 128)
    source = torch.randn(elements, dtype=torch.bfloat16, device=device)
    copy = BoundCall("copy", (torch.empty_like(source), source))
    left, right = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
    product = BoundCall("product", (left, right))
    timers = {"copy": timer(Tensor.copy_, [copy], device), "product": timer(torch.mm, [product], device)}
    seconds = {name: sorted(taken)[rounds // 2] for name, taken in interleaved(rounds, timers).items()}
    return Ceilings(2 * source.nbytes / seconds["copy"], 2 * side**3 / seconds["product"])


@pytest.fixture(scope="session")
def race() -> Race:
    """`run_race`, once for all contenders of a case; only the latest is kept."""
    return lru_cache(maxsize=1)(run_race)


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """This device's, in this run."""
    return measure_ceilings(DEVICE, ROUNDS)


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> Replayed:
    """The clock that `benchmark` reads; it must come before it."""
    replayed = Replayed()
    request.node.add_marker(pytest.mark.benchmark(timer=replayed, warmup=False))
    return replayed


def chosen(request: pytest.FixtureRequest, case: Case) -> tuple[str, ...]:
    """The contenders of a case that this session runs."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return tuple(one["contender"] for one in params if one.get("case") == case)


def parameters() -> Iterator[Any]:
    """Every contender of every kernel, small sizes first, contenders of a case side by side."""
    for label, model, samples in SHAPES:
        for kernel in CALLS:
            for contender in contenders_of(kernel, DEVICE):
                name = f"{kernel}-{label}-B{samples}-{contender}"
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
