"""DiTFastAttn: self-attention is full, within a window, reused, or shared by guidance, as chosen by step and layer.

Source: Yuan et al., "DiTFastAttn: Attention Compression for Diffusion Transformer Models" (arXiv 2406.08552). Paper and
code keep what full attention adds to a window's before the output projection; ours after it, which is linear, so that
the sum is the same. Its choices are searched greedily by the change of the output; here they are given.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from ebcache_fast.errors import TableError
from ebcache_fast.plan import (
    COMPUTE,
    REUSE,
    Branch,
    FullAndWindow,
    ModelShape,
    Plan,
    Rule,
    SharedByGuidance,
    StepPlan,
    Window,
)

CHOICES: Final = ("full", "window", "reuse", "share")


def ditfastattn(timesteps: tuple[float, ...], shape: ModelShape, choices: Sequence[Sequence[str]], width: int) -> Plan:
    """Plan each layer's self-attention as ``choices`` say, a row of `CHOICES` for each step; all else is computed.

    width: of windows, in tokens. A full attention keeps its difference from a window's only where one follows before
    the next full one. Raises TableError for another number of rows, or of layers, and an unknown choice.
    """
    layers = 1 + shape.sites[-1].layer
    if len(choices) != len(timesteps):
        raise TableError(f"choices: expected a row for each of {len(timesteps)} steps, got {len(choices)}")
    for i, row in enumerate(choices):
        if len(row) != layers:
            raise TableError(f"choices[{i}]: expected one for each of {layers} layers, got {len(row)}")
        if unknown := next((choice for choice in row if choice not in CHOICES), None):
            raise TableError(f"choices[{i}]: expected one of {', '.join(CHOICES)}, got {unknown!r}")

    def rule(step: int, layer: int) -> Rule:
        coming = (choices[later][layer] for later in range(step + 1, len(choices)))
        is_followed = "window" in takewhile(lambda choice: choice != "full", coming)
        full: Rule = FullAndWindow(width) if is_followed else COMPUTE
        return {"full": full, "window": Window(width), "reuse": REUSE, "share": SharedByGuidance()}[
            choices[step][layer]
        ]

    steps = (
        StepPlan(
            shape.sites,
            tuple(rule(step, site.layer) if site.branch is Branch.SELF_ATTN else COMPUTE for site in shape.sites),
        )
        for step in range(len(choices))
    )
    return Plan(tuple(steps), timesteps)
