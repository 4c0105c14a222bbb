"""A run of ATTN_MLP steps against the reference, and against single steps, under the rule of accuracy."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DTYPES, Guarded, assert_accurate
from step_operands import SIZES, StepOperands, advancing, assert_advanced
from torch import Tensor

from ebcache_fast import reference
from ebcache_fast.errors import InputError
from ebcache_fast.kernels.run import run_update
from ebcache_fast.operands import At


def run_reference(case: StepOperands, sums: Tensor) -> Tensor:
    x = case.x.clone()
    reference.run_update(x, sums, case.patches, case.norm, case.at, case.linear, case.guide, case.update)
    return x


CASES = [(name, dtype, 2) for name in SIZES for dtype in DTYPES] + [("plain", torch.float32, n) for n in (1, 3)]


@pytest.mark.parametrize(("name", "dtype", "steps"), CASES)
def test_run(name: str, dtype: torch.dtype, steps: int) -> None:
    case = StepOperands.of(SIZES[name], dtype)
    exact = case.exact()
    x = Guarded(case.x.shape, torch.float32, case.x)
    sums = case.sums[:steps]
    run_update(x.tensor, sums, case.patches, case.norm, case.at, case.linear, case.guide, case.update)
    own = run_reference(case, sums)
    assert_accurate(x.written().to(dtype), own.to(dtype), run_reference(exact, exact.sums[:steps]))


def test_a_run_is_its_steps_one_by_one() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    whole, single = case.x.clone(), case.x.clone()
    run_update(whole, case.sums, case.patches, case.norm, case.at, case.linear, case.guide, case.update)
    for j in range(3):
        at = At(case.at.step + j, case.at.row_of)
        run_update(single, case.sums[j : j + 1], case.patches, case.norm, at, case.linear, case.guide, case.update)
    assert torch.equal(whole, single)


def test_what_is_read_stays_as_it_was() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    read = [case.sums, *case.patches, *case.norm[:2], *case.at[:2], *case.linear, case.guide.settings, *case.update]
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
