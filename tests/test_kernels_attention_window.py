"""Attention within a window: which keys are seen, and operands that lie as models leave them."""

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import DEVICE, DTYPES, Guarded, assert_accurate, draw, huge_zeros, in_float64
from interpreter import only_program
from kernel_operations import check
from stream_operands import WINDOW, windowed
from torch import Tensor

from ebcache_fast.kernels.attention import window_attention
from ebcache_fast.ops import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # inf and NaN are meant

WRITTEN = [((1, 2, 21, 24), 8), ((1, 1, 70, 72), 30)]


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    call = windowed((*shape, 1), dtype)
    return call["q"], call["k"], call["v"]


def run_reference(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return WINDOW.expected(dict(q=q, k=k, v=v, window=window, out=torch.empty_like(q)))["out"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    q, k, v = (40 * each for each in operands((1, 2, 41, 72), dtype))
    check(WINDOW, dict(q=q, k=k, v=v, window=20, out=torch.empty_like(q)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_keys_that_are_not_seen_decide_nothing(sign: float, dtype: torch.dtype) -> None:
    """Logits that rise, or fall, by about 1 a key, up to 1e3: the largest of all lies outside of most windows."""
    q, k, v = operands((1, 1, 150, 16), dtype)
    q[..., 0] = 3.7 * sign
    k[..., 0] = torch.arange(850, 1000, device=DEVICE) * 1.1
    check(WINDOW, dict(q=q, k=k, v=v, window=12, out=torch.empty_like(q)), dtype)


@pytest.mark.parametrize("window", [2, 16, 30])
def test_an_odd_window_is_the_even_one_below(window: int) -> None:
    q, k, v = operands((1, 2, 45, 16), torch.float32)
    outs = [torch.empty_like(q) for _ in range(2)]
    window_attention(q, k, v, window, outs[0])
    window_attention(q, k, v, window + 1, outs[1])
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [86, 2**40])
def test_a_window_over_all_tokens_is_attention(window: int, dtype: torch.dtype) -> None:
    qkv = draw(2, 43, 3 * 2 * 40, dtype=dtype, seed=4)
    own, out = (torch.empty(2, 43, 80, dtype=dtype, device=DEVICE) for _ in range(2))
    exact = torch.empty(2, 43, 80, dtype=torch.float64)
    reference.attention(qkv, 2, own)
    reference.attention(in_float64(qkv), 2, exact)  # type: ignore[arg-type]
    q, k, v = qkv.view(2, 43, 3, 2, 40).permute(2, 0, 3, 1, 4)
    window_attention(q, k, v, window, out.view(2, 43, 2, 40).transpose(1, 2))
    assert_accurate(out, own, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("window", [1, 10, 34])
def test_keys_that_no_query_of_a_tile_sees_are_not_read(window: int, dtype: torch.dtype) -> None:
    """Tokens before and after those of one tile's windows are NaN, which any reading would multiply by a weight."""
    tile, reach = (32 if dtype == torch.float32 else 64), window // 2
    q, k, v = operands((1, 1, 4 * tile, 16), dtype)
    out = torch.full_like(q, math.nan)
    first, last = max(0, tile - reach), 2 * tile + reach  # the tokens that the second tile sees
    for each in (k, v):
        each[:, :, :first], each[:, :, last:] = math.nan, math.nan
    window_attention(q, k, v, window, out)
    seen = (each[:, :, first:last] for each in (q, k, v))
    expected = run_reference(*seen, window)[:, :, tile - first : 2 * tile - first]
    torch.testing.assert_close(out[:, :, tile : 2 * tile], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_heads_do_not_see_each_other(dtype: torch.dtype) -> None:
    whole = tuple(torch.full((3, 3, 21, 20), math.nan, dtype=dtype, device=DEVICE) for _ in range(3))
    for each, values in zip(whole, operands((1, 1, 21, 20), dtype), strict=True):
        each[1:2, 1:2] = values
    out = torch.empty(3, 3, 21, 20, dtype=dtype, device=DEVICE)
    window_attention(*whole, 10, out)
    q, k, v = (each[1:2, 1:2].clone() for each in whole)
    exact = run_reference(*(in_float64(each) for each in (q, k, v)), 10)  # type: ignore[arg-type]
    assert_accurate(out[1:2, 1:2], run_reference(q, k, v, 10), exact)
    assert out.isnan().sum() == 8 * 21 * 20


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """As one linear map leaves them."""
    return torch.stack([q, k, v], dim=2).permute(0, 3, 2, 1, 4).contiguous().permute(2, 0, 3, 1, 4).unbind(0)


def of_three_maps(*each: Tensor) -> tuple[Tensor, ...]:
    return tuple(one.transpose(1, 2).contiguous().transpose(1, 2) for one in each)


def of_norms(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Two that a norm made anew, and one as a linear map left it."""
    return q, k, v.transpose(1, 2).contiguous().transpose(1, 2)


def spread(*each: Tensor) -> tuple[Tensor, ...]:
    """Features that do not lie side by side."""
    return tuple(one.mT.contiguous().mT for one in each)


@pytest.mark.parametrize("lay", [packed, of_three_maps, of_norms, spread])
@pytest.mark.parametrize(("shape", "window"), WRITTEN, ids=str)
def test_operands_may_lie_as_models_leave_them(
    lay: Callable[..., tuple[Tensor, ...]], shape: tuple[int, ...], window: int
) -> None:
    q, k, v = operands(shape, torch.float32)
    expected, out = torch.empty_like(q), Guarded((shape[0], shape[2], shape[1], shape[3]), torch.float32)
    window_attention(q, k, v, window, expected)
    laid = lay(q, k, v)
    before = [one.clone() for one in laid]
    window_attention(*laid, window, out.tensor.transpose(1, 2))
    assert torch.equal(out.written().transpose(1, 2), expected)
    assert all(map(torch.equal, laid, before))


HUGE = {  # rows, heads and tokens, and how far each lies from the next
    "rows": ((3, 1, 9), (2**30 + 16, 0, 16)),
    "heads": ((1, 3, 9), (0, 2**30 + 16, 16)),
    "tokens": ((1, 1, 2125), (0, 0, 2**20)),
}


@pytest.mark.parametrize("what", HUGE)
def test_offsets_beyond_32_bits(what: str) -> None:
    """The last tokens of all lie so far that no 32-bit integer holds their offset."""
    counts, strides = HUGE[what]
    size = sum((count - 1) * stride for count, stride in zip(counts, strides, strict=True)) + 16
    memory = (huge_zeros(size).as_strided((*counts, 16), (*strides, 1)) for _ in range(2))
    x, out = memory
    x[-1, -1, -9:] = draw(9, 16, dtype=torch.float16, seed=5)
    tiles = -(-counts[2] // 64)
    with only_program(counts[0] * counts[1] * tiles - 1):
        window_attention(x, x, x, 4, out)
    near = x[-1:, -1:, -9:].clone()
    exact = run_reference(*[in_float64(near)] * 3, 4)  # type: ignore[list-item]
    assert_accurate(out[-1:, -1:, -5:].contiguous(), run_reference(near, near, near, 4)[:, :, -5:], exact[:, :, -5:])
