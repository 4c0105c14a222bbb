"""The gated sum over all slots against its reference, under the rule of accuracy."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DEVICE, DTYPES, Guarded, assert_accurate, draw, huge_zeros, in_float64
from depth import crossed
from interpreter import only_program
from step_operands import advancing, assert_advanced
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels.gated_sum import gated_sum
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import StepIndex

SHAPES = [(1, 1, 1, 1), (2, 2, 5, 7), (5, 3, 3, 96), (3, 2, 7, 131), (56, 1, 2, 1152)]  # (K, R, T, D)
STEPS, CONDITIONS = 6, 2


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, StepIndex, Tensor]:
    """Slots, their gates as a view of a table with shifts and scales between them, where to read, and a base."""
    slots, rows, _, width = shape
    table = draw(STEPS, slots, 3, CONDITIONS, width, dtype=dtype, seed=2)
    row_of = (torch.arange(rows, dtype=torch.int32, device=DEVICE) + 1) % CONDITIONS
    at = StepIndex(torch.tensor([2], dtype=torch.int32, device=DEVICE), row_of)
    return draw(*shape, dtype=dtype, seed=1), table[:, :, 2], at, draw(*shape[1:], dtype=dtype, seed=3)


@crossed("shape, form, dtype", SHAPES, [(1, True), (2, False), (3, False), (3, True)], DTYPES)
def test_gated_sum(shape: tuple[int, ...], form: tuple[int, bool], dtype: torch.dtype) -> None:
    steps, with_base = form
    slots, gates, at, base = operands(shape, dtype)
    arguments = (slots, gates, at, base if with_base else None)
    sums = Guarded((steps, *shape[1:]), dtype)
    gated_sum(*arguments, sums.tensor)
    own = torch.empty_like(sums.tensor)
    exact = torch.empty(own.shape, dtype=torch.float64)
    reference.gated_sum(*arguments, own)
    reference.gated_sum(*in_float64(arguments), exact)  # type: ignore[misc]
    assert_accurate(sums.written(), own, exact)


def test_what_is_read_stays_as_it_was() -> None:
    slots, gates, at, base = operands((3, 2, 5, 24), torch.float32)
    before = [operand.clone() for operand in (slots, gates, *at[:2], base)]
    gated_sum(slots, gates, at, base, torch.empty(2, 2, 5, 24, device=DEVICE))
    assert all(map(torch.equal, (slots, gates, *at[:2], base), before))


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


@pytest.mark.parametrize("function", [gated_sum, reference.gated_sum])
def test_the_step_advances(function: Callable[..., None]) -> None:
    slots, gates, at, base = operands((3, 2, 17, 24), torch.float32)
    at = advancing(at)
    function(slots, gates, at, base, torch.empty(2, 2, 17, 24, device=DEVICE))
    assert_advanced(at)


WRONG = {
    "four steps": (lambda s, g, a, b: (s, g, a, b, torch.empty(4, *b.shape)), r"4 steps .* outside \[1, 3\]"),
    "no step": (lambda s, g, a, b: (s, g, a, b, torch.empty(0, *b.shape)), "0 steps"),
    "gates of fewer slots": (lambda s, g, a, b: (s, g[:, 1:], a, b, b[None].clone()), "do not fit"),
    "no slots": (lambda s, g, a, b: (s[:0], g[:, :0], a, b, b[None].clone()), "do not fit"),
    "strides of the slots": (lambda s, g, a, b: (s.mT.contiguous().mT, g, a, b, b[None].clone()), "not contiguous"),
    "dtype of the slots": (lambda s, g, a, b: (s.half(), g, a, b, b[None].clone()), "float16"),
    "shape of the base": (lambda s, g, a, b: (s, g, a, b[:1], b[None].clone()), "must be"),
    "float64": (lambda s, g, a, b: (s, g, a, b, b[None].double()), "float64 is none of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_operands_are_refused_before_launch(name: str) -> None:
    change, message = WRONG[name]
    slots, gates, at, base = operands((3, 2, 5, 24), torch.float32)
    *read, sums = change(slots, gates, at, base)
    sums = sums.to(DEVICE).fill_(5.0)
    with pytest.raises(InputError, match=message):
        gated_sum(*read, sums)
    assert (sums == 5.0).all()
