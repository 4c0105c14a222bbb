"""The least time that a case can take on a device, and the products that it is made of."""

from bench.ceilings import Ceilings
from bench.rivals.case import Case
from bench.step_cases import kind_of, work_of
from ebcache_fast.engine.step_scheduler import StepScheduler


def floors(case: Case, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds under which no step of a type can come, nor a run, by compulsory bytes and products."""
    shape, found, run = case.denoiser.shape, dict[str, float](), 0.0
    for dispatch in StepScheduler(case.plan).dispatches():
        least = work_of(dispatch, case.plan, shape, 2 * case.samples, case.dtype.itemsize)
        found[kind_of(dispatch)] = 1e3 * ceilings.floor_seconds(least)
        run += found[kind_of(dispatch)]
    return found | {"run": run}


def products(case: Case) -> dict[str, tuple[int, int, int]]:
    """(M, K, N) of the linear layers of a block."""
    width, rows = case.denoiser.shape.width, 2 * case.samples * case.denoiser.shape.tokens
    return {
        "qkv": (rows, width, 3 * width),
        "proj": (rows, width, width),
        "fc1": (rows, width, 4 * width),
        "fc2": (rows, 4 * width, width),
    }
