"""Latents to tokens against the references, under the rule of accuracy."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DTYPES, Guarded, assert_accurate, huge_zeros
from depth import crossed
from interpreter import only_program
from step_operands import NORMS, RAGGED, SIZES, Sizes, StepOperands, advancing, assert_advanced
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels.embed import embed, embed_norm_modulate
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import StepIndex

EVERY_SIZE_AND_DTYPE = crossed("sizes, dtype", SIZES, DTYPES)


def embedded(case: StepOperands) -> tuple[Tensor, Tensor]:
    """What both references make of a case: h and u."""
    h, u = torch.empty_like(case.h), torch.empty_like(case.h)
    reference.embed_norm_modulate(case.x, case.patches, case.norm, case.at, h, u)
    return h, u


@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_what_lies_beside_the_operands_counts_for_nothing(
    sizes: Sizes, norm: Callable[[StepOperands], StepOperands]
) -> None:
    case = norm(StepOperands.of(sizes, torch.float32))
    alone, h, u = case.amid_nan(), torch.empty_like(case.h), torch.empty_like(case.h)
    embed_norm_modulate(alone.x, alone.patches, alone.norm, alone.at, h, u)
    embed(alone.x, alone.patches, alone.h)
    (own_h, own_u), (exact_h, exact_u) = embedded(case), embedded(case.exact())
    assert_accurate(h, own_h, exact_h)
    assert_accurate(u, own_u, exact_u)
    assert_accurate(alone.h, own_h, exact_h)


@EVERY_SIZE_AND_DTYPE
def test_embed(sizes: Sizes, dtype: torch.dtype) -> None:
    case = StepOperands.of(sizes, dtype)
    h = Guarded(case.h.shape, dtype)
    embed(case.x, case.patches, h.tensor)
    exact = case.exact()
    reference.embed(case.x, case.patches, case.h)
    reference.embed(exact.x, exact.patches, exact.h)
    assert_accurate(h.written(), case.h, exact.h)


@EVERY_SIZE_AND_DTYPE
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
    for ours, own, exact in zip((h, u), embedded(case), embedded(case.exact()), strict=True):
        assert_accurate(*(one[-1:, -16:] for one in (ours, own, exact)))
    assert torch.equal(alone[-1:, -16:], h[-1:, -16:])


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
