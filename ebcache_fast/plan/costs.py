"""What programs cost on a model of given sizes: counts over their launches."""

from ebcache_fast.plan.model_shape import ModelShape
from ebcache_fast.plan.program import Program


def branch_macs(program: Program, shape: ModelShape) -> int:
    """Multiply-accumulates of the branches that a program runs, for one row of the batch."""
    return sum(shape.site_shapes[site].macs for site in program.branches)


def branch_weights(program: Program, shape: ModelShape) -> int:
    """Parameters that these branches read."""
    return sum(shape.site_shapes[site].weights for site in program.branches)
