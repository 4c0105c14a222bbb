"""A run of ATTN_MLP steps: against single steps, and where offsets need 64 bits."""

import dataclasses

import pytest
import torch
from accuracy import assert_accurate, draw, huge_zeros, in_float64
from interpreter import only_program
from kernel_operations import Call
from step_operands import RUN, SIZES, STEP, Sizes, StepOperands
from torch import Tensor

from ebcache_fast.kernels.run import run_update
from ebcache_fast.ops.operands import Norm, StepIndex, Update


@pytest.mark.parametrize("name", ["plain", "memory"])
def test_a_run_is_its_steps_one_by_one(name: str) -> None:
    case = StepOperands.of(SIZES[name], torch.float32)
    whole, single = case.clone(), case.clone()
    run_update(whole.x, case.sums, case.patches, case.norm, case.at, case.linear, case.guide, whole.update)
    for j in range(3):
        sums, at = case.sums[j : j + 1], StepIndex(case.at.step + j, case.at.row_of)
        run_update(single.x, sums, case.patches, case.norm, at, case.linear, case.guide, single.update)
    # a compiler makes each its own code
    torch.testing.assert_close(whole.written, single.written, rtol=1e-5, atol=1e-5)


TOKENS = 2**14  # of a sample, of which the last tile is computed
LONG = Sizes(samples=1, channels=1, patch=1, grid=(1, TOKENS), width=16, copies=1, guided=0)


def assert_last_tile_accurate(call: Call, samples: int, noise: Tensor | None) -> None:
    """Run the last tile of huge latents and sums, that are zero but for their last sample, which is the call's."""
    sums = huge_zeros(len(call["sums"]), samples, TOKENS, 16)
    x = huge_zeros(samples, 1, 1, TOKENS, dtype=torch.float32)
    x[-1], sums[:, -1] = call["x"][0], call["sums"][:, 0]
    at = StepIndex(call["at"].step, call["at"].row_of.expand(samples).contiguous())
    with only_program(TOKENS // 16 - 1, samples - 1):
        run_update(**call | dict(x=x, sums=sums, at=at, update=call["update"]._replace(noise=noise)))
    own, exact = RUN.expected(call)["x"], RUN.expected(in_float64(call))["x"]
    assert_accurate(*(one[..., -16:] for one in (x[-1:].half(), own.half(), exact)))


def test_offsets_beyond_two_to_the_31_in_sums_and_tables() -> None:
    """The third step's sum lies there, and so does its modulation."""
    call = RUN.make(dataclasses.replace(LONG, noise=False), torch.float16)
    call["at"].step.zero_()
    table = huge_zeros(2**31 + 32).as_strided((3, 1, 2, 16), (2**30, 32, 16, 1))
    table.copy_(draw(3, 1, 2, 16, dtype=torch.float16, seed=7))
    call |= dict(norm=Norm(table[:, :, 0], table[:, :, 1], 1e-6))
    call["at"].row_of.zero_()
    assert_last_tile_accurate(call, 2**30 // (16 * TOKENS) + 1, None)


def test_offsets_beyond_two_to_the_31_in_a_step() -> None:
    """The last rows of the stream lie there, and so does their noise of the last step."""
    call = RUN.make(LONG, torch.float16)
    samples, step = 2**31 // (16 * TOKENS) + 1, 16
    call["at"].step.fill_(step)
    call["at"].row_of.zero_()
    noise = huge_zeros(step + 1, samples, 1, 1, TOKENS, dtype=torch.float32)
    noise[step, -1] = call["update"].noise[STEP, 0]
    call |= dict(
        sums=call["sums"][:1],
        norm=Norm(*draw(2, step + 1, 1, 16, dtype=torch.float16, seed=7), 1e-6),
        update=Update(draw(step + 1, 6, dtype=torch.float32, seed=8), noise[:, -1:]),
    )
    assert_last_tile_accurate(call, samples, noise)
