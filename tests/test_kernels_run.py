"""A run of ATTN_MLP steps against the reference, and against single steps, under the rule of accuracy."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from accuracy import DTYPES, Guarded, assert_accurate, draw, huge_zeros, in_float64
from depth import crossed
from interpreter import only_program
from step_operands import NORMS, RAGGED, SIZES, STEP, Sizes, StepOperands, advancing, assert_advanced
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels.run import run_update
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Norm, StepIndex, Update


def run_reference(case: StepOperands, sums: Tensor) -> Tensor:
    done = case.clone()
    reference.run_update(done.x, sums, case.patches, case.norm, case.at, case.linear, case.guide, done.update)
    return done.written


@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_what_lies_beside_the_operands_counts_for_nothing(
    sizes: Sizes, norm: Callable[[StepOperands], StepOperands]
) -> None:
    case = norm(StepOperands.of(sizes, torch.float32))
    alone, exact = case.amid_nan(), case.exact()
    run_update(alone.x, alone.sums, alone.patches, alone.norm, alone.at, alone.linear, alone.guide, alone.update)
    assert_accurate(alone.written, run_reference(case, case.sums), run_reference(exact, exact.sums))


@crossed("sizes, dtype", SIZES, DTYPES)
def test_run(sizes: Sizes, dtype: torch.dtype) -> None:
    check(sizes, dtype, 2)


@pytest.mark.parametrize("steps", [1, 3])
def test_shorter_and_longer_runs(steps: int) -> None:
    check(SIZES["memory"], torch.float32, steps)


def check(sizes: Sizes, dtype: torch.dtype, steps: int) -> None:
    """Hold a run of so many steps against its reference."""
    case = StepOperands.of(sizes, dtype)
    exact = case.exact()
    x = Guarded(case.x.shape, torch.float32, case.x)
    sums = case.sums[:steps]
    own = run_reference(case, sums)
    run_update(x.tensor, sums, case.patches, case.norm, case.at, case.linear, case.guide, case.update)
    written = dataclasses.replace(case, x=x.written()).written
    assert_accurate(written.to(dtype), own.to(dtype), run_reference(exact, exact.sums[:steps]))


@pytest.mark.parametrize("name", ["plain", "memory"])
def test_a_run_is_its_steps_one_by_one(name: str) -> None:
    case = StepOperands.of(SIZES[name], torch.float32)
    whole, single = case.clone(), case.clone()
    run_update(whole.x, case.sums, case.patches, case.norm, case.at, case.linear, case.guide, whole.update)
    for j in range(3):
        sums, at = case.sums[j : j + 1], StepIndex(case.at.step + j, case.at.row_of)
        run_update(single.x, sums, case.patches, case.norm, at, case.linear, case.guide, single.update)
    torch.testing.assert_close(
        whole.written, single.written, rtol=1e-5, atol=1e-5
    )  # a compiler makes each its own code


TOKENS = 2**14  # of a sample, of which the last tile is computed
LONG = Sizes(samples=1, channels=1, patch=1, grid=(1, TOKENS), width=16, copies=1, guided=0)


def assert_last_tile_accurate(case: StepOperands, sums: Tensor, samples: int, noise: Tensor | None) -> None:
    """Run the last tile of huge latents and sums, that are zero but for their last sample, which is the case's."""
    x, totals = huge_zeros(samples, 1, 1, TOKENS, dtype=torch.float32), huge_zeros(len(sums), samples, TOKENS, 16)
    x[-1], totals[:, -1] = case.x[0], sums[:, 0]
    at = StepIndex(case.at.step, case.at.row_of.expand(samples).contiguous())
    update = case.update._replace(noise=noise)
    with only_program(TOKENS // 16 - 1, samples - 1):
        run_update(x, totals, case.patches, case.norm, at, case.linear, case.guide, update)
    own, exact = run_reference(case, sums), run_reference(case.exact(), in_float64(sums))
    assert_accurate(*(one[..., -16:] for one in (x[-1:].half(), own.half(), exact)))


def test_offsets_beyond_two_to_the_31_in_sums_and_tables() -> None:
    """The third step's sum lies there, and so does its modulation."""
    case = StepOperands.of(dataclasses.replace(LONG, noise=False), torch.float16)
    case.at.step.zero_()
    table = huge_zeros(2**31 + 32).as_strided((3, 1, 2, 16), (2**30, 32, 16, 1))
    table.copy_(draw(3, 1, 2, 16, dtype=torch.float16, seed=7))
    case = dataclasses.replace(case, norm=Norm(table[:, :, 0], table[:, :, 1], 1e-6))
    assert_last_tile_accurate(case, case.sums, 2**30 // (16 * TOKENS) + 1, None)


def test_offsets_beyond_two_to_the_31_in_a_step() -> None:
    """The last rows of the stream lie there, and so does their noise of the last step."""
    case = StepOperands.of(LONG, torch.float16)
    samples, step = 2**31 // (16 * TOKENS) + 1, 16
    case.at.step.fill_(step)
    noise = huge_zeros(step + 1, samples, 1, 1, TOKENS, dtype=torch.float32)
    noise[step, -1] = case.update.noise[STEP, 0]
    case = dataclasses.replace(
        case,
        norm=Norm(*draw(2, step + 1, 1, 16, dtype=torch.float16, seed=7), 1e-6),
        update=Update(draw(step + 1, 6, dtype=torch.float32, seed=8), noise[:, -1:]),
    )
    assert_last_tile_accurate(case, case.sums[:1], samples, noise)


def test_what_is_read_stays_as_it_was() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    read = [case.sums, *case.patches, *case.norm[:2], *case.at[:2], *case.linear, case.guide.settings]
    read += [case.update.coefficients, case.update.noise]
    before = [operand.clone() for operand in read]
    run_update(case.x, case.sums, case.patches, case.norm, case.at, case.linear, case.guide, case.update)
    assert all(map(torch.equal, read, before))


@pytest.mark.parametrize("function", [run_update, reference.run_update])
def test_the_step_advances(function: Callable[..., None]) -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    at = advancing(case.at)
    function(case.x, case.sums, case.patches, case.norm, at, case.linear, case.guide, case.update)
    assert_advanced(at)


WRONG = {
    "float64 latents": (lambda c: dict(x=c.x.double()), "latents of shape"),
    "float64 sums": (lambda c: dict(sums=c.sums.double()), "float64 is none of"),
    "strides of the sums": (lambda c: dict(sums=c.sums.mT.contiguous().mT), "not contiguous"),
    "every other sum": (lambda c: dict(sums=torch.cat([c.sums, c.sums])[::2]), "not contiguous"),
    "an embedding of another width": (
        lambda c: dict(patches=c.patches._replace(weight=c.patches.weight[1:])),
        "must be",
    ),
    "noise of another batch": (
        lambda c: dict(update=c.update._replace(noise=c.update.noise[:, 1:])),
        "latents of shape",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_operands_are_refused_before_launch(name: str) -> None:
    change, message = WRONG[name]
    case = StepOperands.of(SIZES["plain"], torch.float32)
    names = ("x", "sums", "patches", "norm", "at", "linear", "guide", "update")
    operands = {name: getattr(case, name) for name in names} | change(case)
    before = operands["x"].clone()
    with pytest.raises(InputError, match=message):
        run_update(**operands)
    assert torch.equal(operands["x"], before)
