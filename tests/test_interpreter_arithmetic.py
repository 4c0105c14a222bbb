"""The interpreter's repairs: it adds, multiplies and compares as compiled code does."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE, draw
from torch import Tensor
from triton.runtime.errors import InterpreterError

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")


@triton.jit
def multiply_and_add(x, y, z, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


def rounded(exact: Fraction, dtype: torch.dtype) -> float:
    """A number of float32 or float16 nearest to an exact one, of two the even one; from its neighbours alone."""
    kind = {torch.float32: np.float32, torch.float16: np.float16}[dtype]
    guess = kind(float(exact))
    near = [np.nextafter(guess, kind(-np.inf)), guess, np.nextafter(guess, kind(np.inf))]
    finite = [one for one in near if np.isfinite(one)]
    bits = {torch.float32: np.int32, torch.float16: np.int16}[dtype]
    return float(min(finite, key=lambda one: (abs(Fraction(float(one)) - exact), int(one.view(bits)) & 1)))


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """By a kernel, of any number of numbers."""
    size = triton.next_power_of_2(len(x))
    padded = [torch.nn.functional.pad(one, (0, size - len(one))).to(DEVICE) for one in (x, y, z)]
    out = torch.empty_like(padded[0])
    multiply_and_add[(1,)](*padded, out, SIZE=size)
    return out[: len(x)].cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    """Products beside ties of the result, which an addend far below decides; and numbers of any size."""
    bits = 24 if dtype == torch.float32 else 11
    halves = 2 ** (bits // 2)
    signs = (1.0, -1.0)
    cases = [
        (sign * (halves * 2 + 1), (halves / 2 + a) * 2.0**-b, c * 2.0**-d)
        for sign in signs for a in (-1, 0, 1) for b in (0, bits // 2, bits) for c in signs for d in (1, bits, 14)
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(3, 200, generator=generator) * 2.0 ** torch.randint(-6, 6, (3, 200), generator=generator)
    draws[2, :100] = -draws[0, :100].to(dtype).float() * draws[1, :100].to(dtype).float()  # what rounding lost is left
    x, y, z = torch.cat([torch.tensor(cases).T, draws], dim=1).to(dtype)
    exact = [
        Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    ]
    assert fma(x, y, z).tolist() == [rounded(one, dtype) for one in exact]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("factors", [(673, 24929), (1549, 10831)], ids=["even below", "even above"])
def test_an_addend_far_below_a_tie_decides_it(factors: tuple[int, int], sign: int) -> None:
    """Of a product of 25 bits: float64 can't hold both, and would leave the tie to the even one."""
    x, y = torch.tensor([sign * factors[0] * 1.0] * 2), torch.tensor([factors[1] * 2.0**-24] * 2)
    addends = [2.0**-60, -(2.0**-60)]
    product = Fraction(x[0].item()) * Fraction(y[0].item())
    nearest = [rounded(product + Fraction(one), torch.float32) for one in addends]
    assert fma(x, y, torch.tensor(addends)).tolist() == nearest
    assert nearest[0] > nearest[1]


def test_fma_of_infinities_and_nan() -> None:
    inf, nan = np.inf, np.nan
    ours = fma(torch.tensor([inf, inf, 0.0, nan, 3e38, -3e38]), torch.tensor([2.0, 2.0, inf, 1.0, 2.0, 2.0]),
               torch.tensor([1.0, -inf, 1.0, 1.0, 1.0, inf]))  # fmt: skip
    np.testing.assert_array_equal(ours.numpy(), np.array([inf, nan, nan, nan, inf, inf], np.float32))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fma_of_other_numbers_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InterpreterError, match="the interpreter has no"):
        fma(*torch.ones(3, 1, dtype=dtype))


@triton.jit
def extrema(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, tl.maximum(a, b))
    tl.store(out + SIZE + i, tl.minimum(a, b))
    tl.store(out + 2 * SIZE + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 3 * SIZE + i, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 4 * SIZE + i, tl.clamp(a, -1.0, 1.0))
    tl.store(out + 5 * SIZE + i, tl.zeros((SIZE,), tl.float32) + tl.max(a))
    tl.store(out + 6 * SIZE + i, tl.zeros((SIZE,), tl.float32) + tl.min(a))


def test_a_nan_in_a_maximum_is_the_other_operand_unless_nan_is_asked_for() -> None:
    nan = np.nan
    out = torch.empty(7, 4, device=DEVICE)
    extrema[(1,)](torch.tensor([nan, 2.0, nan, -5.0], device=DEVICE), torch.tensor([3.0, nan, nan, 4.0], device=DEVICE),
                  out, SIZE=4)  # fmt: skip
    expected = [
        [3.0, 2.0, nan, 4.0], [3.0, 2.0, nan, -5.0], [nan, nan, nan, 4.0], [nan, nan, nan, -5.0],
        [out[4, 0].item(), 1.0, out[4, 2].item(), -1.0], [2.0] * 4, [-5.0] * 4,
    ]  # fmt: skip
    np.testing.assert_array_equal(out.cpu().numpy(), np.array(expected, np.float32))
    assert out[4].isfinite().all()  # of a NaN one of the two limits: which one differs from card to card


def test_the_maximum_of_nothing_but_nan_is_nan_without_a_word() -> None:
    x, out = torch.full((4,), np.nan, device=DEVICE), torch.empty(7, 4, device=DEVICE)
    extrema[(1,)](x, x, out, SIZE=4)
    assert out[[0, 1, 2, 3, 5, 6]].isnan().all()


@triton.jit
def sums(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = tl.load(x + i[:, None] * SIZE + i[None, :])
    tl.store(out + i, tl.sum(tile, axis=1))
    tl.store(out + SIZE + i, tl.sum(tile, axis=0))
    tl.store(out + 2 * SIZE, tl.sum(tile))
    tl.store(out + 3 * SIZE + i, tl.reshape(tl.sum(tile, axis=1, keep_dims=True), (SIZE,)))


def test_a_sum_of_float16_is_rounded_at_each_addition() -> None:
    """So that it stays at a number which ones are too small for, and passes through infinity."""
    x = torch.zeros(16, 16, dtype=torch.float16)
    x[0], x[1, :2] = 1.0, torch.tensor([60000.0, 60000.0])
    x[2, 0], x[2, 1:] = 4096.0, 1.0
    x[3] = torch.arange(16.0)
    out = torch.empty(4, 16, dtype=torch.float16, device=DEVICE)
    sums[(1,)](x.to(DEVICE), out, SIZE=16)
    assert out[0, [0, 1, 3, 4]].tolist() == [16.0, np.inf, 120.0, 0.0]
    assert out[0, 2] < 4096 + 15
    assert torch.equal(out[0], out[3])
    assert out[1, 0] == 64096.0
    assert out[2, 0] == np.inf


def test_a_sum_of_bfloat16_is_refused_and_one_of_float32_is_not() -> None:
    x = draw(16, 16, dtype=torch.float32, seed=1)
    out = torch.empty(4, 16, device=DEVICE)
    sums[(1,)](x, out, SIZE=16)
    torch.testing.assert_close(out[0], x.sum(1))
    if DEVICE.type == "cpu":
        with pytest.raises(InterpreterError, match="no bfloat16 arithmetic"):
            sums[(1,)](x.bfloat16(), out.bfloat16(), SIZE=16)
