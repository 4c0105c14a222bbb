"""The reference operations against formulas written out in float64 numpy, on odd shapes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebcache_fast import reference

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


def test_norm_modulate(rows: int, tokens: int, width: int) -> None:
    h, shift, scale = draw((rows, tokens, width), (rows, width), (rows, width))
    h = h * 3 + 2  # a mean and a variance of its own
    expected = numpy_norm_modulate(h.numpy(), shift.numpy(), scale.numpy())
    assert_close(reference.norm_modulate(h, shift, scale, EPS), expected)


def test_norm_modulate_keeps_to_its_epsilon(rows: int, tokens: int, width: int) -> None:
    # At a variance near epsilon a wrong epsilon shows.
    h, shift, scale = draw((rows, tokens, width), (rows, width), (rows, width))
    h = h * 1e-3
    expected = numpy_norm_modulate(h.numpy(), shift.numpy(), scale.numpy())
    assert_close(reference.norm_modulate(h, shift, scale, EPS), expected)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_gated_residual(count: int, rows: int, tokens: int, width: int) -> None:
    h, *branches = draw(*[(rows, tokens, width)] * (count + 1))
    gates = draw(*[(rows, width)] * count, seed=1)
    kept = [tensor.clone() for tensor in (h, *branches)]
    expected = numpy_gated_sum(h.numpy(), [b.numpy() for b in branches], [g.numpy() for g in gates])
    assert_close(reference.gated_residual(h, branches, gates), expected)
    assert all(map(torch.equal, (h, *branches), kept))  # a cached branch must survive its use


def test_a_branch_without_a_gate_is_an_error(rows: int, tokens: int, width: int) -> None:
    h, branch = draw(*[(rows, tokens, width)] * 2)
    with pytest.raises(ValueError, match="zip"):
        reference.gated_residual(h, [branch], [])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_gated_residual_norm_modulate(count: int, rows: int, tokens: int, width: int) -> None:
    h, *branches = draw(*[(rows, tokens, width)] * (count + 1))
    shift, scale, *gates = draw(*[(rows, width)] * (count + 2), seed=1)
    new_h, u = reference.gated_residual_norm_modulate(h, branches, gates, shift, scale, EPS)
    expected = numpy_gated_sum(h.numpy(), [b.numpy() for b in branches], [g.numpy() for g in gates])
    assert_close(new_h, expected)
    assert_close(u, numpy_norm_modulate(expected, shift.numpy(), scale.numpy()))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_gated_sum(count: int, rows: int, tokens: int, width: int) -> None:
    h, slots, gates = draw((rows, tokens, width), (count, rows, tokens, width), (count, rows, width))
    kept = h.clone(), slots.clone()
    expected = numpy_gated_sum(h.numpy(), list(slots.numpy()), list(gates.numpy()))
    assert_close(reference.gated_sum(h, slots, gates), expected)
    assert torch.equal(h, kept[0])
    assert torch.equal(slots, kept[1])


def test_head_tokens(rows: int, tokens: int, width: int) -> None:
    h, shift, scale = draw((rows, tokens, width), (rows, width), (rows, width))
    linear = nn.Linear(width, 3, dtype=torch.float64)
    modulated = numpy_norm_modulate(h.numpy(), shift.numpy(), scale.numpy())
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    with torch.no_grad():
        assert_close(reference.head_tokens(h, shift, scale, linear, EPS), modulated @ weight.T + bias)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_guide(channels: int, as_tensor: bool, rows: int, tokens: int, width: int) -> None:
    cond, uncond = draw(*[(rows, 3, tokens, width)] * 2)
    scale = 1.7
    expected = cond.numpy().copy()
    for c in range(channels):
        expected[:, c] = uncond.numpy()[:, c] + scale * (cond.numpy()[:, c] - uncond.numpy()[:, c])
    given = torch.tensor(scale, dtype=torch.float64) if as_tensor else scale
    assert_close(reference.guide(cond, uncond, given, channels), expected)


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
    ours = reference.sampler_update(x, eps, 1.5 * variance if learned else None, noise, given)
    assert_close(ours, expected)
    without_noise = reference.sampler_update(x, eps, variance, None, given)
    assert_close(without_noise, row["cx"] * x.numpy() + row["ce"] * eps.numpy())


def test_sampler_update_keeps_the_latents_dtype(rows: int, tokens: int, width: int) -> None:
    x, eps, variance, noise = (tensor.float() for tensor in draw(*[(rows, 2, tokens, width)] * 4))
    row = torch.tensor(list(ROW.values()))
    ours = reference.sampler_update(x, eps.bfloat16(), variance.bfloat16(), noise, row)
    rounded = (tensor.bfloat16().float() for tensor in (eps, variance))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, reference.sampler_update(x, *rounded, noise, row))
