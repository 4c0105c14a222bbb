"""The interpreter's repairs: its bfloat16 and float8 are torch's, or an error."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE, draw
from float8 import needs_float8
from hypothesis import given
from hypothesis import strategies as st
from interpreter import narrow, narrow8, only_program, widen, widen8
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")

TIES = [0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x00008000, 0x00018000, 0x7F7E8000]  # halfway between two
BESIDE_TIES = [bits + step for bits in TIES for step in (-1, 1)]
EDGES = [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000]
NANS = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7F80FFFF]


def floats(bits: object) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


def bits_by_torch(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize("bits", [TIES, BESIDE_TIES, EDGES], ids=["ties", "beside ties", "edges"])
def test_narrow_rounds_as_torch_does(bits: list[int]) -> None:
    np.testing.assert_array_equal(narrow(floats(bits)), bits_by_torch(floats(bits)))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_narrow_rounds_any_number_as_torch_does(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    np.testing.assert_array_equal(narrow(values), bits_by_torch(values))


def test_narrow_keeps_nan_and_shape() -> None:
    narrowed = narrow(floats(NANS).reshape(2, 3))
    assert narrowed.shape == (2, 3)
    assert np.isnan(widen(narrowed)).all()


def test_widen_is_exact_for_every_bfloat16() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    torchs = torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(widen(bits), torchs)


def bits_of_float8_by_torch(values: np.ndarray) -> np.ndarray:
    """Torch's float8 has NaN for what is too large, so that nothing may be."""
    return torch.from_numpy(values.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def every_float8() -> np.ndarray:
    """By torch."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def test_widen8_is_exact_for_every_float8() -> None:
    np.testing.assert_array_equal(widen8(np.arange(256, dtype=np.uint8)), every_float8())


def test_narrow8_rounds_as_torch_does_at_and_beside_every_number_and_every_tie() -> None:
    numbers = np.sort(every_float8()[np.isfinite(every_float8())])
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = np.concatenate([every_float8(), middles])
    for values in (exact, np.nextafter(exact, np.float32(0)), np.nextafter(middles, middles * 2)):
        np.testing.assert_array_equal(narrow8(values), bits_of_float8_by_torch(values))


@given(st.lists(st.floats(-448, 448, width=32), min_size=1))
def test_narrow8_rounds_any_number_as_torch_does(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    np.testing.assert_array_equal(narrow8(values), bits_of_float8_by_torch(values))


TOO_LARGE = [448.1, 464.0, 465.0, 1e30, np.inf]  # where torch makes NaN of the last three


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at).T).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dot_of_bfloat16(dtype: torch.dtype) -> None:
    a, b = (draw(32, 32, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    out = torch.empty(32, 32, dtype=dtype, device=DEVICE)
    product[(1,)](a, b, out, SIZE=32)
    exact = a.double() @ b.double().T
    torch.testing.assert_close(out, exact.to(dtype))


@triton.jit
def converted(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def test_a_kernel_converts_as_torch_does() -> None:
    x = torch.from_numpy(floats(TIES + BESIDE_TIES[:9])).to(DEVICE)
    out = torch.empty(16, dtype=torch.bfloat16, device=DEVICE)
    converted[(1,)](x, out, SIZE=16)
    assert torch.equal(out, x.bfloat16())
    back = torch.empty(16, device=DEVICE)
    converted[(1,)](out, back, SIZE=16)
    assert torch.equal(back, out.float())


@needs_float8
def test_a_kernel_converts_to_float8_as_torch_does_and_stays_at_the_largest() -> None:
    numbers = [*every_float8()[:127], *TOO_LARGE, 17.0, 19.0, -17.0, -19.0, 2**-10, 3 * 2**-10, np.nan]
    x = torch.tensor([*numbers, *[0.0] * (256 - len(numbers))], dtype=torch.float32, device=DEVICE)
    out, back = torch.empty(256, dtype=torch.float8_e4m3fn, device=DEVICE), torch.empty(256, device=DEVICE)
    converted[(1,)](x, out, SIZE=256)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    converted[(1,)](out, back, SIZE=256)
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)


@interpreted
def test_conversions_past_float32_are_refused() -> None:
    with pytest.raises(InterpreterError, match="go through float32"):
        converted[(1,)](torch.ones(4, dtype=torch.int32), torch.empty(4, dtype=torch.bfloat16), SIZE=4)


@triton.jit
def plus(x, out):
    tl.store(out, tl.load(x) + tl.load(x))


@triton.jit
def times(x, out):
    tl.store(out, tl.load(x) * tl.load(x))


@triton.jit
def minus(x, out):
    tl.store(out, -tl.load(x))


@interpreted
@pytest.mark.parametrize("kernel", [plus, times, minus], ids=lambda kernel: kernel.__name__)
def test_arithmetic_of_bfloat16_is_refused(kernel: object) -> None:
    x, out = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 5.0, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="no bfloat16 arithmetic"):
        kernel[(1,)](x, out)
    assert out == 5.0


@interpreted
@pytest.mark.parametrize("kernel", [plus, times, minus], ids=lambda kernel: kernel.__name__)
def test_arithmetic_of_float8_is_refused(kernel: object) -> None:
    with pytest.raises(InterpreterError, match="no float8 arithmetic"):
        kernel[(1,)](torch.ones(1).to(torch.float8_e4m3fn), torch.ones(1).to(torch.float8_e4m3fn))


def test_functions_of_bfloat16_are_refused() -> None:
    """By the builder itself: what of the language can reach this differs from version to version."""
    with pytest.raises(NotImplementedError, match="no bfloat16 arithmetic"):
        InterpreterBuilder().unary_op(TensorHandle(np.ones(1, np.uint16), tl.bfloat16), np.abs)


@interpreted
@pytest.mark.parametrize("kernel", [plus, times, minus], ids=lambda kernel: kernel.__name__)
def test_arithmetic_of_float16_is_not(kernel: object) -> None:
    x, out = torch.full((1,), 3.0, dtype=torch.float16), torch.empty(1, dtype=torch.float16)
    kernel[(1,)](x, out)
    assert out == {plus: 6.0, times: 9.0, minus: -3.0}[kernel]


@triton.jit
def place(out):
    program = tl.program_id(0) + 10 * tl.program_id(1) + 100 * tl.program_id(2)
    tl.store(out + program, 1)


@pytest.fixture
def places() -> Tensor:
    return torch.zeros(1000, dtype=torch.int32, device=DEVICE)


@interpreted
def test_only_program_runs_that_one(places: Tensor) -> None:
    with only_program(4, 3, 2):
        place[(5, 4, 3)](places)
    assert places.nonzero().flatten().tolist() == [234]


def test_all_programs_run_after_it(places: Tensor) -> None:
    with only_program(4, 3, 2):
        pass
    place[(5, 4, 3)](places)
    assert int(places.sum()) == 60
