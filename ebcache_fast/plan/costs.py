"""Costs of programs on a model of given sizes: counts over their launches."""

from ebcache_fast.plan.model_shape import ModelShape
from ebcache_fast.plan.program import BRANCH, Launch, Program


def branch_macs(program: Program, shape: ModelShape) -> int:
    """Multiply-accumulates of the branches that a program runs, for one row of the batch."""
    return sum(_macs(launch, shape) for launch in program if launch.name == BRANCH)


def branch_weights(program: Program, shape: ModelShape) -> int:
    """Parameters that the branches of a program read."""
    return sum(shape.site_shapes[site].weights for site in dict.fromkeys(program.branches))


def _macs(launch: Launch, shape: ModelShape) -> int:
    """Multiply-accumulates of one branch for one row of the batch, fewer where it runs some tokens or half the rows."""
    macs = shape.site_shapes[launch.site].macs
    if launch.window:  # scores and sums reach so many tokens of all
        macs -= 2 * shape.tokens * max(0, shape.tokens - launch.window - 1) * shape.width
    if launch.tokens:
        macs = macs * launch.tokens // shape.tokens
    return macs // 2 if launch.is_shared else macs
