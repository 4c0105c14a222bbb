"""The reference operations against formulas written out in float64 numpy, on odd shapes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Norm, StepIndex
from ebcache_fast.ops.update import sampler_update

EPS = 1e-6
SHAPES = [(1, 1, 4), (3, 7, 12), (17, 5, 20), (33, 3, 8)]  # (N, T, D)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

pytestmark = pytest.mark.parametrize(("rows", "tokens", "width"), SHAPES, ids=str)


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def numpy_norm_modulate(h: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out = np.empty_like(h)
    for n, t in np.ndindex(h.shape[:2]):
        token = h[n, t]
        normed = (token - token.mean()) / math.sqrt(((token - token.mean()) ** 2).mean() + EPS)
        out[n, t] = normed * (1 + scale[n]) + shift[n]
    return out


def numpy_gated_sum(h: np.ndarray, branches: list[np.ndarray], gates: list[np.ndarray]) -> np.ndarray:
    total = h.copy()
    for branch, gate in zip(branches, gates, strict=True):
        for n, t in np.ndindex(h.shape[:2]):
            total[n, t] += gate[n] * branch[n, t]
    return total


def assert_close(ours: Tensor, theirs: np.ndarray) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, torch.from_numpy(theirs), **CLOSE)


def table(rows: int, width: int, count: int, seed: int = 1) -> tuple[list[Tensor], StepIndex, list[np.ndarray]]:
    """Modulation tables of two steps and three conditions, where step 1 reads, and what each row gets of them."""
    tables = draw(*[(2, 3, width)] * count, seed=seed)
    row_of = (torch.arange(rows, dtype=torch.int32) * 2) % 3
    return (
        tables,
        StepIndex(torch.tensor([1], dtype=torch.int32), row_of),
        [t.numpy()[1, row_of.numpy()] for t in tables],
    )


@pytest.mark.parametrize("size", [3.0, 1e-3], ids=["plain", "near epsilon"])
def test_norm_modulate(size: float, rows: int, tokens: int, width: int) -> None:
    h = draw((rows, tokens, width))[0] * size + 2 * size  # a mean and a variance of its own
    vectors, at, (shift, scale) = table(rows, width, 2)
    expected = numpy_norm_modulate(h.numpy(), shift, scale)
    assert_close(reference.norm_modulate(h, Norm(*vectors, EPS), at), expected)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_gated_residual(count: int, rows: int, tokens: int, width: int) -> None:
    h, *branches = draw(*[(rows, tokens, width)] * (count + 1))
    gates, at, chosen = table(rows, width, count)
    kept = [branch.clone() for branch in branches]
    expected = numpy_gated_sum(h.numpy(), [b.numpy() for b in branches], chosen)
    reference.gated_residual(h, branches, gates, at)
    assert_close(h, expected)
    assert all(map(torch.equal, branches, kept))  # a cached branch must survive its use


def test_a_branch_without_a_gate_is_an_error(rows: int, tokens: int, width: int) -> None:
    h, branch = draw(*[(rows, tokens, width)] * 2)
    with pytest.raises(ValueError, match="zip"):
        reference.gated_residual(h, [branch], [], table(rows, width, 0)[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_gated_residual_norm_modulate(count: int, rows: int, tokens: int, width: int) -> None:
    h, *branches = draw(*[(rows, tokens, width)] * (count + 1))
    (shift, scale, *gates), at, (chosen_shift, chosen_scale, *chosen) = table(rows, width, count + 2)
    expected = numpy_gated_sum(h.numpy(), [b.numpy() for b in branches], chosen)
    u = torch.empty_like(h)
    reference.gated_residual_norm_modulate(h, branches, gates, Norm(shift, scale, EPS), at, u)
    assert_close(h, expected)
    assert_close(u, numpy_norm_modulate(expected, chosen_shift, chosen_scale))


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_gated_sum(count: int, with_base: bool, rows: int, tokens: int, width: int) -> None:
    base, slots, gates = draw((rows, tokens, width), (count, rows, tokens, width), (4, count, 3, width))
    at = table(rows, width, 0)[1]
    sums = torch.empty(3, rows, tokens, width, dtype=torch.float64)
    reference.gated_sum(slots, gates, at, base if with_base else None, sums)
    start = base.numpy() if with_base else np.zeros(base.shape)
    for j, ours in enumerate(sums):
        chosen = gates.numpy()[1 + j][:, at.row_of.numpy()]
        assert_close(ours, numpy_gated_sum(start, list(slots.numpy()), list(chosen)))


ROW = {"cx": 1.1, "ce": -0.3, "min_log": -7.0, "max_log": -2.0, "noise_on": 1.0, "sigma": 0.0}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"noise_on": 0.0}, {"noise_on": 0.0, "sigma": 0.4}],
    ids=["learned variance", "no noise", "fixed deviation"],
)
def test_sampler_update(changes: dict, learned: bool, rows: int, tokens: int, width: int) -> None:
    x, eps, variance, noise = draw(*[(rows, 2, tokens, width)] * 4)
    row = ROW | changes
    v = 1.5 * variance.numpy() if learned else np.full(x.shape, -1.0)  # beyond [-1, 1] too
    log_variance = row["min_log"] * (1 - v) / 2 + row["max_log"] * (1 + v) / 2
    deviation = row["noise_on"] * np.sqrt(np.exp(log_variance)) + row["sigma"]
    expected = row["cx"] * x.numpy() + row["ce"] * eps.numpy() + deviation * noise.numpy()
    given = torch.tensor(list(row.values()), dtype=torch.float64)
    ours = sampler_update(x, eps, 1.5 * variance if learned else None, noise, given)
    assert_close(ours, expected)
    without_noise = sampler_update(x, eps, variance, None, given)
    assert_close(without_noise, row["cx"] * x.numpy() + row["ce"] * eps.numpy())


def test_sampler_update_keeps_the_latents_dtype(rows: int, tokens: int, width: int) -> None:
    x, eps, variance, noise = (tensor.float() for tensor in draw(*[(rows, 2, tokens, width)] * 4))
    row = torch.tensor(list(ROW.values()))
    ours = sampler_update(x, eps.bfloat16(), variance.bfloat16(), noise, row)
    rounded = (tensor.bfloat16().float() for tensor in (eps, variance))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, sampler_update(x, *rounded, noise, row))
