"""Latents to tokens where offsets need 64 bits; what else holds for them is in `test_kernels`."""

import torch
from accuracy import assert_accurate, huge_zeros, in_float64
from interpreter import only_program
from step_operands import EMBED_NORM, Sizes, StepOperands

from ebcache_fast.kernels.embed import embed, embed_norm_modulate
from ebcache_fast.ops.operands import StepIndex


def test_offsets_beyond_two_to_the_31() -> None:
    """The last tile of the last sample, of latents and of the stream, that are zero but for it."""
    tokens, samples = 2**16, 2**14 + 1
    sizes = Sizes(samples=1, channels=2, patch=1, grid=(1, tokens), width=2, copies=1, guided=0)
    case = StepOperands.of(sizes, torch.float16)
    x = huge_zeros(samples, 2, 1, tokens, dtype=torch.float32)
    h, u, alone = (huge_zeros(samples, tokens, 2) for _ in range(3))
    x[-1] = case.x[0]
    at = StepIndex(case.at.step, case.at.row_of.expand(samples).contiguous())
    with only_program(tokens // 16 - 1, samples - 1):
        embed_norm_modulate(x, case.patches, case.norm, at, h, u)
        embed(x, case.patches, alone)
    call = EMBED_NORM.make(sizes, torch.float16)
    own, exact = EMBED_NORM.expected(call), EMBED_NORM.expected(in_float64(call))
    for ours, name in ((h, "h"), (u, "u")):
        assert_accurate(*(one[-1:, -16:] for one in (ours, own[name], exact[name])))
    assert torch.equal(alone[-1:, -16:], h[-1:, -16:])
