"""The gated residual and its modulated LayerNorm: tiles that are not full, offsets that need 64 bits."""

import pytest
import torch
from accuracy import DEVICE, assert_accurate, huge_zeros, in_float64
from interpreter import only_program
from kernel_operations import check
from stream_operands import RESIDUAL, RESIDUAL_NORM, STEP

from ebcache_fast.kernels import launch
from ebcache_fast.kernels.gated_residual import gated_residual, gated_residual_norm_modulate
from ebcache_fast.ops.operands import StepIndex


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 2, 19), (7, 1, 96)], ids=str)
def test_a_last_tile_that_is_not_full(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From many rows on a program takes several, and the last one finds fewer."""
    several = {80: ((launch.ALL, launch.Launch(rows=4, cols=0, warps=8)),)}
    monkeypatch.setattr(launch, "TABLE", {"gated_residual": several})
    for operation in (RESIDUAL, RESIDUAL_NORM):
        check(operation, operation.make(shape, 1, torch.float32), torch.float32)


def test_without_branches_the_stream_is_not_written() -> None:
    call = RESIDUAL_NORM.make((2, 3, 40), 0, torch.float32)
    before = call["h"].clone()
    gated_residual_norm_modulate(**call)
    assert torch.equal(call["h"], before)


def test_offsets_beyond_two_to_the_31() -> None:
    width = 16
    rows = launch.parameters("gated_residual", 2**31 // width, DEVICE).rows
    tokens = 2**31 // width + rows
    call = RESIDUAL_NORM.make((1, rows, width), 2, torch.float16)
    h, u, *branches = (huge_zeros(1, tokens, width) for _ in range(4))
    for huge, small in zip((h, *branches), (call["h"], *call["branches"]), strict=True):
        huge[:, -rows:] = small
    with only_program(tokens // rows - 1):
        gated_residual_norm_modulate(**call | dict(h=h, branches=branches, u=u))
    own, exact = RESIDUAL_NORM.expected(call), RESIDUAL_NORM.expected(in_float64(call))
    assert_accurate(h[:, -rows:], own["h"], exact["h"])
    assert_accurate(u[:, -rows:], own["u"], exact["u"])
    h[:, -rows:] = call["h"]
    with only_program(tokens // rows - 1):
        gated_residual(h, branches, call["gates"], call["at"])
    assert_accurate(h[:, -rows:], own["h"], exact["h"])


@pytest.mark.parametrize(("where", "strides"), [((2, 0), (2**30, 16)), ((0, 4), (16, 2**29))], ids=str)
def test_tables_beyond_two_to_the_31(where: tuple[int, int], strides: tuple[int, int]) -> None:
    """A step's vectors lie there, or those of one of its conditions."""
    call = RESIDUAL.make((1, 1, 16), 1, torch.float16)
    step, condition = where
    table = huge_zeros(2**31 + 16).as_strided((step + 1, condition + 1, 16), (*strides, 1))
    table[where] = call["gates"][0][STEP, int(call["at"].row_of)]
    at = StepIndex(*(torch.full((1,), index, dtype=torch.int32, device=DEVICE) for index in where))
    h = call["h"].clone()
    gated_residual(h, call["branches"], [table], at)
    assert_accurate(h, RESIDUAL.expected(call)["h"], RESIDUAL.expected(in_float64(call))["h"])
