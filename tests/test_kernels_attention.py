"""Attention from packed projections against its reference, under the rule of accuracy."""

import math

import pytest
import torch
from accuracy import DEVICE, DTYPES, Guarded, assert_accurate, draw, huge_zeros, in_float64, in_place
from depth import crossed
from interpreter import only_program
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels.attention import attention
from ebcache_fast.ops import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # inf and NaN are meant

HALVES = (torch.float16, torch.bfloat16)
SHAPES = [  # (R, T, heads, head_dim)
    (1, 1, 1, 1),
    (2, 7, 3, 5),
    (3, 17, 2, 16),
    (2, 19, 3, 20),
    (2, 33, 2, 40),
    (1, 37, 2, 80),
    (1, 18, 2, 88),
    (2, 16, 1, 96),
    (1, 21, 1, 128),
    (1, 31, 16, 72),
]
MANY_TILES = [(2, 131, 2, 72), (3, 347, 1, 24), (1, 64, 16, 72)]  # both tile sizes, whole and cut


def run_reference(qkv: Tensor, heads: int) -> Tensor:
    rows, tokens, width = qkv.shape
    out = torch.empty(rows, tokens, width // 3, dtype=qkv.dtype, device=qkv.device)
    reference.attention(qkv, heads, out)
    return out


def check(qkv: Tensor, heads: int) -> None:
    rows, tokens, width = qkv.shape
    out = Guarded((rows, tokens, width // 3), qkv.dtype)
    attention(qkv, heads, out.tensor)
    assert_accurate(out.written(), run_reference(qkv, heads), run_reference(in_float64(qkv), heads))


@crossed("shape, dtype", SHAPES, DTYPES)
def test_attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, tokens, heads, head = shape
    check(draw(rows, tokens, 3 * heads * head, dtype=dtype, seed=1), heads)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", MANY_TILES, ids=str)
def test_many_tiles(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, tokens, heads, head = shape
    check(draw(rows, tokens, 3 * heads * head, dtype=dtype, seed=1), heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    """Logits near +-1e4, of which exp overflows in any of the dtypes: the softmax is nearly a choice."""
    check(draw(2, 41, 3 * 72, dtype=dtype, seed=2, scale=40.0), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_logit_may_come_first_or_last(sign: float, dtype: torch.dtype) -> None:
    """Logits that rise, or fall, by about 1 a key over several tiles of keys, up to 1e3."""
    qkv = draw(1, 150, 3 * 16, dtype=dtype, seed=3)
    qkv[..., 0] = 3.7 * sign
    qkv[0, :, 16] = torch.arange(850, 1000, device=DEVICE) * 1.1
    check(qkv, 1)


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
    assert_accurate(out[1:2], run_reference(qkv[1:2], 2), run_reference(in_float64(qkv[1:2]), 2))
    assert out[0].isnan().all()
    assert out[2].isnan().all()


@pytest.mark.parametrize("head", [5, 20, 40, 72])
def test_heads_do_not_see_each_other(head: int) -> None:
    """Between two heads of NaN: a feature of theirs would show."""
    qkv = torch.full((1, 9, 3, 3, head), math.nan, dtype=torch.float16, device=DEVICE)
    qkv[:, :, :, 1] = draw(1, 9, 3, head, dtype=torch.float16, seed=6)
    out = torch.empty(1, 9, 3, head, dtype=torch.float16, device=DEVICE)
    attention(qkv.view(1, 9, -1), 3, out.view(1, 9, -1))
    alone = qkv[:, :, :, 1].reshape(1, 9, -1)
    assert_accurate(out[:, :, 1], run_reference(alone, 1), run_reference(in_float64(alone), 1))
    assert out[:, :, ::2].isnan().all()


def test_what_is_read_stays_as_it_was() -> None:
    qkv = draw(2, 11, 3 * 48, dtype=torch.float32, seed=7)
    before = qkv.clone()
    attention(qkv, 2, torch.empty(2, 11, 48, device=DEVICE))
    assert torch.equal(qkv, before)


def test_offsets_beyond_32_bits() -> None:
    """The last of so many rows that no 32-bit integer holds its offset."""
    tokens, head = 17, 20
    rows = 2**31 // (tokens * 3 * head) + 3
    qkv, out = huge_zeros(rows, tokens, 3 * head), huge_zeros(rows, tokens, head)
    qkv[-1] = draw(tokens, 3 * head, dtype=torch.float16, seed=8)
    with only_program(rows - 1):
        attention(qkv, 1, out)
    assert_accurate(out[-1:], run_reference(qkv[-1:], 1), run_reference(in_float64(qkv[-1:]), 1))
    assert not out[-2].any()


WRONG = {
    "float64": (lambda qkv, heads, out: (qkv.double(), heads, out.double()), "float64 is none of"),
    "no heads": (lambda qkv, heads, out: (qkv, 0, out), "0 heads"),
    "less than no heads": (lambda qkv, heads, out: (qkv, -3, out), "-3 heads"),
    "heads that do not divide D": (lambda qkv, heads, out: (qkv, 5, out), "5 heads do not cut 48"),
    "more heads than channels": (lambda qkv, heads, out: (qkv, 96, out), "96 heads do not cut 48"),
    "wide heads": (
        lambda qkv, heads, out: (torch.zeros(2, 5, 3 * 258), 2, torch.zeros(2, 5, 258)),
        "heads of 1 to 128; leave this to torch",
    ),
    "unpacked": (lambda qkv, heads, out: (qkv.view(2, 5, 3, 48), heads, out), r"must be \(2, 5, 144\)"),
    "only two of three": (lambda qkv, heads, out: (qkv[..., :96].contiguous(), heads, out), r"must be \(2, 5, 144\)"),
    "rows of out": (lambda qkv, heads, out: (qkv, heads, out[:1]), r"must be \(1, 5, 144\)"),
    "no tokens": (lambda qkv, heads, out: (qkv[:, :0], heads, out[:, :0]), "one or more of each"),
    "strides of qkv": (lambda qkv, heads, out: (torch.zeros(2, 144, 5).mT, heads, out), "not contiguous"),
    "strides of out": (lambda qkv, heads, out: (qkv, heads, torch.zeros(2, 48, 5).mT), "not contiguous"),
    "dtype of qkv": (lambda qkv, heads, out: (qkv.half(), heads, out), "float16"),
    "dtype of out": (lambda qkv, heads, out: (qkv, heads, out.bfloat16()), "bfloat16"),
    "device": (lambda qkv, heads, out: (qkv.to("meta"), heads, out), "meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_operands_are_refused_before_launch(name: str) -> None:
    change, message = WRONG[name]
    qkv, heads, out = change(torch.zeros(2, 5, 144), 3, torch.full((2, 5, 48), 5.0))
    qkv, out = map(in_place, (qkv, out))
    before = out.clone()
    with pytest.raises(InputError, match=message):
        attention(qkv, heads, out)
    assert torch.equal(out, before)
