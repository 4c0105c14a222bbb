"""The linear map with GELU against its reference, under the rule of accuracy, in both of its forms."""

import math

import pytest
import torch
import triton
from accuracy import DEVICE, DTYPES, Guarded, assert_accurate, draw, huge_zeros, in_float64, in_place
from depth import crossed
from interpreter import only_program
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import launch
from ebcache_fast.kernels import linear_gelu as file
from ebcache_fast.kernels.linear_gelu import linear_gelu
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Linear

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton.runtime.interpreter"
)  # 1 / inf is the 0 that is meant

POINTER_ARCH = 80  # an architecture without TMA
HAS_TMA = launch.arch_of(DEVICE) >= file.TMA_ARCH
SHAPES = [  # (M, D, F)
    (1, 1, 1),
    (3, 5, 7),
    (7, 131, 13),
    (67, 72, 200),
    (2, 1152, 144),
]
MANY_TILES = [(3, 48, 4608), (600, 8, 136), (1031, 3, 129)]  # across, more than one group of eight down, larger tiles


def among_nan(values: Tensor) -> Tensor:
    """The same values with NaN on either side of their memory, so that a value read from outside shows."""
    memory = torch.full((values.numel() + 2048,), math.nan, dtype=values.dtype, device=values.device)
    memory[1024:-1024] = values.flatten()
    return memory[1024:-1024].view(values.shape)


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Linear]:
    rows, depth, cols = shape
    weight = draw(cols, depth, dtype=dtype, seed=2, scale=2 * depth**-0.5)
    return among_nan(draw(rows, depth, dtype=dtype, seed=1)), Linear(
        among_nan(weight), among_nan(draw(cols, dtype=dtype, seed=3))
    )


def run_reference(u: Tensor, linear: Linear) -> Tensor:
    out = torch.empty(len(u), len(linear.weight), dtype=u.dtype, device=u.device)
    reference.linear_gelu(u, linear, out)
    return out


def check(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    u, linear = operands(shape, dtype)
    out = Guarded((shape[0], shape[2]), dtype)
    linear_gelu(u, linear, out.tensor)
    assert_accurate(out.written(), run_reference(u, linear), run_reference(*in_float64((u, linear))))


@pytest.fixture
def without_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda device: POINTER_ARCH)


@crossed("shape, dtype", SHAPES, DTYPES)
def test_as_the_device_has_it(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.usefixtures("without_tma")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_by_pointers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.parametrize("shape", MANY_TILES, ids=str)
def test_many_tiles(shape: tuple[int, int, int]) -> None:
    check(shape, torch.float16)


@pytest.mark.usefixtures("without_tma")
@pytest.mark.parametrize("shape", MANY_TILES[:2], ids=str)
def test_many_tiles_by_pointers(shape: tuple[int, int, int]) -> None:
    check(shape, torch.float16)


@pytest.mark.skipif(not HAS_TMA, reason="this device has no TMA")
def test_aligned_rows_go_by_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_pointer_kernel", None)
    check((3, 24, 40), torch.bfloat16)
    check((3, 12, 20), torch.float32)


@pytest.mark.parametrize("shape", [(3, 23, 40), (3, 28, 40), (3, 24, 39), (3, 24, 44)], ids=str)
def test_unaligned_rows_go_by_pointers(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_tma_kernel", None)
    check(shape, torch.bfloat16)


@pytest.mark.parametrize("which", ["u", "weight", "out"])
def test_unaligned_memory_goes_by_pointers(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_tma_kernel", None)
    u, linear = operands((5, 24, 40), torch.float16)
    moved = {"u": u, "weight": linear.weight, "out": torch.empty(5, 40, dtype=u.dtype, device=DEVICE)}
    expected = run_reference(u, linear)
    memory = torch.empty(moved[which].numel() + 1, dtype=u.dtype, device=DEVICE)
    moved[which] = memory[1:].view(moved[which].shape).copy_(moved[which])
    linear_gelu(moved["u"], Linear(moved["weight"], linear.bias), moved["out"])
    torch.testing.assert_close(moved["out"], expected, rtol=2e-3, atol=2e-3)


def test_a_single_row_may_have_any_stride() -> None:
    """Such a row counts as contiguous whatever its first stride is."""
    _, linear = operands((1, 24, 40), torch.float16)
    u, out = draw(3, 37, dtype=torch.float16, seed=1)[:1, :24], torch.empty(1, 40, dtype=torch.float16, device=DEVICE)
    assert u.stride() == (37, 1)
    linear_gelu(u, linear, out)
    torch.testing.assert_close(out, run_reference(u, linear), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_of_gelu(dtype: torch.dtype) -> None:
    """0 far below, the identity far above, and no overflow on the way."""
    far = torch.tensor([-6e4, -3e3, -40.0, 0.0, 40.0, 3e3, 6e4], dtype=dtype, device=DEVICE)
    out = Guarded((7, 1), dtype)
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    linear_gelu(far[:, None], Linear(one, torch.zeros_like(one[0])), out.tensor)
    assert torch.equal(out.written()[:, 0], far.clamp(min=0))


def test_what_is_read_stays_as_it_was() -> None:
    u, linear = operands((9, 40, 72), torch.float32)
    before = [tensor.clone() for tensor in (u, *linear)]
    linear_gelu(u, linear, torch.empty(9, 72, device=DEVICE))
    assert all(map(torch.equal, (u, *linear), before))


BEYOND = 2**31 // 63 + 200  # rows of 63 whose offsets no 32-bit integer holds
HUGE = {"u": (BEYOND, 63, 5), "weight": (3, 63, BEYOND), "out": (2**31 // 129 + 200, 3, 129)}


@pytest.mark.parametrize("which", HUGE)
def test_offsets_beyond_32_bits(which: str) -> None:
    """The last program's tile of a tensor of more than 2^31 elements, by pointers: rows are no multiple of 16 bytes."""
    rows, depth, cols = HUGE[which]
    u, out = huge_zeros(rows, depth), huge_zeros(rows, cols)
    linear = Linear(huge_zeros(cols, depth), huge_zeros(cols))
    assert max(u.numel(), linear.weight.numel(), out.numel()) > 2**31
    u[-2:] = draw(2, depth, dtype=torch.float16, seed=1)
    linear.weight[-1:] = draw(1, depth, dtype=torch.float16, seed=2)
    linear.bias[-1:] = 2.0
    tile = launch.parameters("linear_gelu", rows, DEVICE)
    with only_program(triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols) - 1):
        linear_gelu(u, linear, out)
    expected = run_reference(u[-2:].double(), Linear(linear.weight[-1:].double(), linear.bias[-1:].double()))
    torch.testing.assert_close(out[-2:, -1:].double(), expected, rtol=2e-3, atol=2e-3)
    assert float(out[-3, -1]) == pytest.approx(1.954, rel=2e-3), "gelu(2), where u is 0"


def strided(rows: int, cols: int) -> Tensor:
    return torch.zeros(rows, 2 * cols)[:, ::2]


WRONG = {
    "float64": (lambda u, w, b, o: (u.double(), w.double(), b.double(), o.double()), "float64 is none of"),
    "u of three dimensions": (lambda u, w, b, o: (u[None], w, b, o), "not matrices"),
    "out of three dimensions": (lambda u, w, b, o: (u, w, b, o[None]), "not matrices"),
    "no rows": (lambda u, w, b, o: (u[:0], w, b, o[:0]), "one or more of each"),
    "no features": (lambda u, w, b, o: (u, w[:0], b[:0], o[:, :0]), "one or more of each"),
    "rows of out": (lambda u, w, b, o: (u, w, b, o[:4]), r"must be \(5, 24\)"),
    "weight of the other layout": (lambda u, w, b, o: (u, w.T.contiguous(), b, o), r"must be \(24, 16\)"),
    "size of the bias": (lambda u, w, b, o: (u, w, b[:3], o), r"must be \(24,\)"),
    "strides of u": (lambda u, w, b, o: (strided(5, 16), w, b, o), "not contiguous"),
    "strides of out": (lambda u, w, b, o: (u, w, b, strided(5, 24)), "not contiguous"),
    "dtype of the weight": (lambda u, w, b, o: (u, w.half(), b, o), "float16"),
    "dtype of the bias": (lambda u, w, b, o: (u, w, b.bfloat16(), o), "bfloat16"),
    "dtype of out": (lambda u, w, b, o: (u, w, b, o.half()), "float16"),
    "device": (lambda u, w, b, o: (u, w.to("meta"), b, o), "meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_operands_are_refused_before_launch(name: str) -> None:
    change, message = WRONG[name]
    u, weight, bias, out = change(torch.zeros(5, 16), torch.zeros(24, 16), torch.zeros(24), torch.full((5, 24), 5.0))
    u, weight, bias, out = map(in_place, (u, weight, bias, out))
    before = out.clone()
    with pytest.raises(InputError, match=message):
        linear_gelu(u, Linear(weight, bias), out)
    assert torch.equal(out, before)
