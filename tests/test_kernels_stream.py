"""What kernels over the stream share, asked of kernels of its own."""

import pytest
import torch
import triton
import triton.language as tl

from ebcache_fast.kernels import launch
from ebcache_fast.kernels._stream import merge_statistics, quotient


@triton.jit
def _quotient_kernel(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, quotient(tl.load(a + at), tl.load(b + at)))


def test_equal_numbers_have_their_own_mean() -> None:
    """Of 49 numbers, say, the sum times 1/49 is not what a 49th of it is."""
    counts = torch.arange(1.0, 4097.0)
    for number in (-3.5, 1000.25):
        sums, means = number * counts, torch.empty(4096)
        with launch.on(sums):
            _quotient_kernel[(1,)](sums, counts, means, N=4096)
        assert bool((means == number).all())


@triton.jit
def _statistics_kernel(x, out, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.arange(0, ROWS)
    mean, squares = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        keep = (col < D)[None, :]
        tile = tl.load(x + row[:, None] * D + col[None, :], mask=keep, other=0.0)
        mean, squares = merge_statistics(start, mean, squares, tile, keep, tl.minimum(D - start, COLS))
    tl.store(out + row, mean)
    tl.store(out + ROWS + row, squares)


@pytest.mark.parametrize("width", [1, 127, 128, 1153, 6001])
def test_mean_and_deviations_of_rows_of_any_width(width: int) -> None:
    noise = torch.randn(4, width, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = 1e4 + torch.arange(width) + noise.to(torch.empty(0))  # every tile has another mean
    out, exact = torch.empty(2, 4), x.double()
    with launch.on(x):
        _statistics_kernel[(1,)](x, out, width, ROWS=4, COLS=128)
    mean = exact.mean(1)
    assert bool(((out[0] - mean).abs() <= 2e-7 * mean).all())  # two units
    squares = (exact - mean[:, None]).square().sum(1)
    assert bool(((out[1] - squares).abs() <= 1e-4 * squares + 1e-6).all())
