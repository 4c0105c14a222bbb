"""Learning-to-Cache: every other step is full, and in those between a learned router says which branches are computed.

Source: Ma et al., "Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching" (arXiv 2406.01733), and its
released routers, which `ebcache_fast.models.router_file` reads. Indices count down to 0 at the last executed step; even
ones reuse.
"""

from collections.abc import Mapping, Sequence

from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, REUSE, ModelShape, Plan, StepPlan, shown

Scores = Mapping[int, Sequence[float]]  # by index: of each site in the order in which the model runs them
THRESHOLD = 0.1  # of a released 256-pixel router; that of 512 pixels goes with 0.9


def l2c(timesteps: tuple[float, ...], shape: ModelShape, scores: Scores, threshold: float = THRESHOLD) -> Plan:
    """Plan full steps at odd indices and at the first step, and else the branches whose score is above ``threshold``.

    scores: in [0, 1], of each even index. Raises TableError for a missing index, scores of another number of sites, a
    score or a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise TableError(f"threshold: expected 0 to 1, got {threshold}; released routers go with 0.1, or 0.9")
    sites, plans = shape.sites, []
    for executed, index in enumerate(reversed(range(len(timesteps)))):
        if executed == 0 or index % 2:
            plans.append(StepPlan(sites, (COMPUTE,) * len(sites)))
            continue
        row = scores.get(index)
        if row is None or len(row) != len(sites):
            got = "none" if row is None else len(row)
            raise TableError(f"scores[{index}]: expected {len(sites)}, one for each branch of the model, got {got}")
        if wrong := next((score for score in row if not 0 <= score <= 1), None):
            raise TableError(f"scores[{index}]: expected 0 to 1, got {shown(wrong)}")
        plans.append(StepPlan(sites, tuple(COMPUTE if score > threshold else REUSE for score in row)))
    return Plan(tuple(plans), timesteps)
