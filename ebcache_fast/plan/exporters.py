"""Tables as other projects take them: which steps compute, as a mask or as bins of a mask.

Both say of a step only whether it computes or not. What one that does not compute does instead is then theirs:
cache-dit reuses or forecasts blocks, and knows neither our laws nor our corrections.
"""

from itertools import groupby
from typing import NamedTuple

from ebcache_fast.errors import TableError
from ebcache_fast.plan import StepPlan, StepType
from ebcache_fast.plan.table import CacheTable


class Bins(NamedTuple):
    """Lengths of the stretches of steps that compute, and of those between them; a run begins with the first."""

    compute_bins: tuple[int, ...]
    cache_bins: tuple[int, ...]


def steps_mask(table: CacheTable) -> list[int]:
    """1 for each step that computes everything, 0 for each that computes nothing, in execution order.

    cache-dit's ``steps_computation_mask``. Raises TableError, naming the first step that does neither.
    """
    steps = table.step_plans or table.step_types
    return [_computes(i, step) for i, step in enumerate(steps)]


def bins(table: CacheTable) -> Bins:
    """The mask as lengths: cache-dit's ``compute_bins`` and ``cache_bins``, which SGLang and vLLM-Omni hand on to it.

    Raises TableError as `steps_mask` does.
    """
    lengths = [(computes, len(list(group))) for computes, group in groupby(steps_mask(table))]
    return Bins(
        tuple(length for computes, length in lengths if computes),
        tuple(length for computes, length in lengths if not computes),
    )


def _computes(i: int, step: StepPlan | StepType | None) -> int:
    if isinstance(step, StepPlan):
        computes = None if step.computed and step.reused else bool(step.computed)
        name = step.type_name
    else:
        computes = {StepType.NO_CACHE: True, StepType.ATTN_MLP: False}.get(step) if step is not None else None
        name = "MIXED" if step is None else step.name
    if computes is None:
        raise TableError(
            f"steps[{i}]: expected a step that computes everything or nothing, got {name}; a mask has no other: use a "
            "table of NO_CACHE and ATTN_MLP, or of the path search"
        )
    return int(computes)
