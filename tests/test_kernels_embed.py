"""Latents to tokens against the references, under the rule of accuracy."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DTYPES, Guarded, assert_accurate
from step_operands import SIZES, Sizes, StepOperands, advancing, assert_advanced

from ebcache_fast import reference
from ebcache_fast.errors import InputError
from ebcache_fast.kernels.embed import embed, embed_norm_modulate

EVERY_SIZE = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EVERY_SIZE
@EVERY_DTYPE
def test_embed(sizes: Sizes, dtype: torch.dtype) -> None:
    case = StepOperands.of(sizes, dtype)
    h = Guarded(case.h.shape, dtype)
    embed(case.x, case.patches, h.tensor)
    exact = case.exact()
    reference.embed(case.x, case.patches, case.h)
    reference.embed(exact.x, exact.patches, exact.h)
    assert_accurate(h.written(), case.h, exact.h)


@EVERY_SIZE
@EVERY_DTYPE
def test_embed_norm_modulate(sizes: Sizes, dtype: torch.dtype) -> None:
    case = StepOperands.of(sizes, dtype)
    h, u = Guarded(case.h.shape, dtype), Guarded(case.h.shape, dtype)
    embed_norm_modulate(case.x, case.patches, case.norm, case.at, h.tensor, u.tensor)
    exact = case.exact()
    own_u, exact_u = torch.empty_like(case.h), torch.empty_like(exact.h)
    reference.embed_norm_modulate(case.x, case.patches, case.norm, case.at, case.h, own_u)
    reference.embed_norm_modulate(exact.x, exact.patches, exact.norm, exact.at, exact.h, exact_u)
    assert_accurate(h.written(), case.h, exact.h)
    assert_accurate(u.written(), own_u, exact_u)


def test_the_epsilon_counts() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    for operand in (case.x, case.patches.bias, case.patches.positions):
        operand.mul_(1e-3)
    norm = case.norm._replace(eps=1e-4)
    u, own_u = torch.empty_like(case.h), torch.empty_like(case.h)
    embed_norm_modulate(case.x, case.patches, norm, case.at, case.h, u)
    exact = case.exact()
    exact_u = torch.empty_like(exact.h)
    reference.embed_norm_modulate(case.x, case.patches, norm, case.at, case.h, own_u)
    reference.embed_norm_modulate(exact.x, exact.patches, exact.norm._replace(eps=1e-4), exact.at, exact.h, exact_u)
    assert_accurate(u, own_u, exact_u)


@pytest.mark.parametrize("function", [embed_norm_modulate, reference.embed_norm_modulate])
def test_the_step_advances(function: Callable[..., None]) -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    at = advancing(case.at)
    function(case.x, case.patches, case.norm, at, case.h, torch.empty_like(case.h))
    assert_advanced(at)


def test_what_is_read_stays_as_it_was() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    read = [case.x, *case.patches, case.norm.shift, case.norm.scale, *case.at[:2]]
    before = [operand.clone() for operand in read]
    embed_norm_modulate(case.x, case.patches, case.norm, case.at, case.h, torch.empty_like(case.h))
    assert all(map(torch.equal, read, before))


WRONG = {
    "float64 latents": (lambda c: dict(x=c.x.double()), "latents of shape"),
    "bfloat16 latents": (lambda c: dict(x=c.x.bfloat16()), "latents of shape"),
    "strides of x": (lambda c: dict(x=c.x.mT.contiguous().mT), "latents of shape"),
    "x of another size": (lambda c: dict(x=c.x[..., :-1].contiguous()), "can't be cut"),
    "three rows a sample": (lambda c: dict(x=torch.cat([c.x, c.x, c.x])[:5].contiguous()), "4 rows for 5 samples"),
    "dtype of the weight": (lambda c: dict(patches=c.patches._replace(weight=c.patches.weight.half())), "float16"),
    "shape of the bias": (lambda c: dict(patches=c.patches._replace(bias=c.patches.bias[1:])), "must be"),
    "positions of another grid": (
        lambda c: dict(patches=c.patches._replace(positions=c.patches.positions[1:])),
        "must be",
    ),
    "float64 stream": (lambda c: dict(h=c.h.double()), "float64 is none of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_operands_are_refused_before_launch(name: str) -> None:
    change, message = WRONG[name]
    case = StepOperands.of(SIZES["plain"], torch.float32)
    operands = dict(x=case.x, patches=case.patches, h=case.h) | change(case)
    before = operands["h"].clone()
    with pytest.raises(InputError, match=message):
        embed(**operands)
    with pytest.raises(InputError, match=message):
        embed_norm_modulate(norm=case.norm, at=case.at, u=torch.empty_like(operands["h"]), **operands)
    assert torch.equal(operands["h"], before)
