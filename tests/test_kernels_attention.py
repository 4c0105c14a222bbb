"""Attention from packed projections: what softmax makes of large logits, and who sees whom."""

import math

import pytest
import torch
from accuracy import DEVICE, DTYPES, assert_accurate, draw, huge_zeros, in_float64
from interpreter import only_program
from kernel_operations import Call, check
from stream_operands import ATTENTION
from torch import Tensor

from ebcache_fast.kernels.attention import attention

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # inf and NaN are meant


def call_of(qkv: Tensor, heads: int) -> Call:
    rows, tokens, width = qkv.shape
    return dict(qkv=qkv, heads=heads, out=torch.empty(rows, tokens, width // 3, dtype=qkv.dtype, device=DEVICE))


def assert_accurate_alone(out: Tensor, qkv: Tensor, heads: int) -> None:
    """Hold what became of these projections among others against them alone."""
    call = call_of(qkv, heads)
    assert_accurate(out, ATTENTION.expected(call)["out"], ATTENTION.expected(in_float64(call))["out"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    """Logits near +-1e4, of which exp overflows in any of the dtypes: the softmax is nearly a choice."""
    check(ATTENTION, call_of(draw(2, 41, 3 * 72, dtype=dtype, seed=2, scale=40.0), 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_logit_may_come_first_or_last(sign: float, dtype: torch.dtype) -> None:
    """Logits that rise, or fall, by about 1 a key over several tiles of keys, up to 1e3."""
    qkv = draw(1, 150, 3 * 16, dtype=dtype, seed=3)
    qkv[..., 0] = 3.7 * sign
    qkv[0, :, 16] = torch.arange(850, 1000, device=DEVICE) * 1.1
    check(ATTENTION, call_of(qkv, 1), dtype)


def test_equal_logits_give_the_mean() -> None:
    qkv = draw(1, 43, 3 * 24, dtype=torch.float32, seed=4)
    qkv[..., :48] = 2.5
    out = torch.empty(1, 43, 24, device=DEVICE)
    attention(qkv, 1, out)
    torch.testing.assert_close(out, qkv[..., 48:].mean(1, keepdim=True).expand_as(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    """Between two rows of NaN: a key or value of theirs would show."""
    qkv = torch.full((3, 21, 3 * 40), math.nan, dtype=dtype, device=DEVICE)
    qkv[1] = draw(21, 3 * 40, dtype=dtype, seed=5)
    out = torch.empty(3, 21, 40, dtype=dtype, device=DEVICE)
    attention(qkv, 2, out)
    assert_accurate_alone(out[1:2], qkv[1:2], 2)
    assert out[0].isnan().all()
    assert out[2].isnan().all()


@pytest.mark.parametrize("head", [5, 20, 40, 72])
def test_heads_do_not_see_each_other(head: int) -> None:
    """Between two heads of NaN: a feature of theirs would show."""
    qkv = torch.full((1, 9, 3, 3, head), math.nan, dtype=torch.float16, device=DEVICE)
    qkv[:, :, :, 1] = draw(1, 9, 3, head, dtype=torch.float16, seed=6)
    out = torch.empty(1, 9, 3, head, dtype=torch.float16, device=DEVICE)
    attention(qkv.view(1, 9, -1), 3, out.view(1, 9, -1))
    assert_accurate_alone(out[:, :, 1], qkv[:, :, :, 1].reshape(1, 9, -1), 1)
    assert out[:, :, ::2].isnan().all()


def test_offsets_beyond_32_bits() -> None:
    """The last of so many rows that no 32-bit integer holds its offset."""
    tokens, head = 17, 20
    rows = 2**31 // (tokens * 3 * head) + 3
    qkv, out = huge_zeros(rows, tokens, 3 * head), huge_zeros(rows, tokens, head)
    qkv[-1] = draw(tokens, 3 * head, dtype=torch.float16, seed=8)
    with only_program(rows - 1):
        attention(qkv, 1, out)
    assert_accurate_alone(out[-1:], qkv[-1:], 1)
    assert not out[-2].any()
