"""The linear map with GELU: both of its forms, the ends of GELU, offsets that need 64 bits."""

import pytest
import torch
import triton
from accuracy import DEVICE, DTYPES, Guarded, draw, huge_zeros, in_float64
from interpreter import only_program
from kernel_operations import check
from stream_operands import GELU, MANY_TILES, MATRICES

from ebcache_fast.kernels import launch
from ebcache_fast.kernels import linear_gelu as file
from ebcache_fast.kernels.linear_gelu import linear_gelu
from ebcache_fast.ops.operands import Linear

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # 1 / inf is the 0 meant

POINTER_ARCH = 80  # an architecture without TMA
HAS_TMA = launch.arch_of(DEVICE) >= file.TMA_ARCH


@pytest.fixture
def without_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda device: POINTER_ARCH)


def check_shape(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(GELU, GELU.make(shape, dtype), dtype)


@pytest.mark.usefixtures("without_tma")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MATRICES[3:], ids=str)
def test_by_pointers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_shape(shape, dtype)


@pytest.mark.usefixtures("without_tma")
@pytest.mark.parametrize("shape", MANY_TILES[:2], ids=str)
def test_many_tiles_by_pointers(shape: tuple[int, int, int]) -> None:
    check_shape(shape, torch.float16)


@pytest.mark.skipif(not HAS_TMA, reason="this device has no TMA")
def test_aligned_rows_go_by_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_pointer_kernel", None)
    check_shape((3, 24, 40), torch.bfloat16)
    check_shape((3, 12, 20), torch.float32)


@pytest.mark.parametrize("shape", [(3, 23, 40), (3, 28, 40), (3, 24, 39), (3, 24, 44)], ids=str)
def test_unaligned_rows_go_by_pointers(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_tma_kernel", None)
    check_shape(shape, torch.bfloat16)


@pytest.mark.parametrize("which", ["u", "weight", "out"])
def test_unaligned_memory_goes_by_pointers(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_tma_kernel", None)
    call = GELU.make((5, 24, 40), torch.float16)
    expected, linear = GELU.expected(call)["out"], call["linear"]
    moved = {"u": call["u"], "weight": linear.weight, "out": call["out"]}
    memory = torch.empty(moved[which].numel() + 1, dtype=torch.float16, device=DEVICE)
    moved[which] = memory[1:].view(moved[which].shape).copy_(moved[which])
    linear_gelu(moved["u"], Linear(moved["weight"], linear.bias), moved["out"])
    torch.testing.assert_close(moved["out"], expected, rtol=2e-3, atol=2e-3)


def test_a_single_row_may_have_any_stride() -> None:
    """Such a row counts as contiguous whatever its first stride is."""
    u = draw(3, 37, dtype=torch.float16, seed=1)[:1, :24]
    assert u.stride() == (37, 1)
    check(GELU, GELU.make((1, 24, 40), torch.float16) | dict(u=u), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_of_gelu(dtype: torch.dtype) -> None:
    """0 far below, the identity far above, and no overflow on the way."""
    far = torch.tensor([-6e4, -3e3, -40.0, 0.0, 40.0, 3e3, 6e4], dtype=dtype, device=DEVICE)
    out = Guarded((7, 1), dtype)
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    linear_gelu(far[:, None], Linear(one, torch.zeros_like(one[0])), out.tensor)
    assert torch.equal(out.written()[:, 0], far.clamp(min=0))


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
    near = in_float64(dict(u=u[-2:], linear=Linear(linear.weight[-1:], linear.bias[-1:]), out=out[-2:, -1:]))
    expected = GELU.expected(near)["out"]
    torch.testing.assert_close(out[-2:, -1:].cpu().double(), expected, rtol=2e-3, atol=2e-3)
    assert float(out[-3, -1]) == pytest.approx(1.954, rel=2e-3), "gelu(2), where u is 0"
