"""The gated sum where offsets need 64 bits; what else holds for it is in `test_kernels`."""

import pytest
import torch
from accuracy import DEVICE, draw, huge_zeros
from interpreter import only_program

from ebcache_fast.kernels.gated_sum import gated_sum
from ebcache_fast.ops.operands import StepIndex


@pytest.mark.parametrize("slots", [1, 3])
def test_offsets_beyond_two_to_the_31(slots: int) -> None:
    """56 slots of DiT-XL/2 pass 2^31 elements at batch 66; here three do, or one alone, zero but for their end."""
    width, tokens = 16, 2**31 // max(1, slots - 1) // 16 + 16
    memory, sums = huge_zeros(slots, 1, tokens, width), huge_zeros(slots, 1, tokens, width)
    memory[:, 0, -16:] = draw(slots, 16, width, dtype=torch.float16, seed=1)
    gates = draw(slots, slots, 1, width, dtype=torch.float16, seed=2)
    at = StepIndex(torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE))
    with only_program(tokens // 16 - 1):
        gated_sum(memory, gates, at, None, sums)
    expected = torch.einsum("skd,ktd->std", gates[:, :, 0].double(), memory[:, 0, -16:].double())
    torch.testing.assert_close(sums[:, 0, -16:].double(), expected, rtol=2e-3, atol=2e-3)
