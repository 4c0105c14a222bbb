"""The reference operations at a step's two ends against loops over pixels, in float64 numpy."""

import math

import numpy as np
import pytest
import torch
from step_operands import SIZES, STEP, Sizes, StepOperands
from torch import Tensor

from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Linear

SMALL = {
    name: SIZES[name]
    for name in ("plain", "one token", "no guidance", "no variance", "no noise", "no channel guided", "memory")
}
EVERY_SIZE = pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)


def case_of(sizes: Sizes) -> StepOperands:
    return StepOperands.of(sizes, torch.float64).exact()


def vectors(table: Tensor, case: StepOperands, step: int = STEP) -> np.ndarray:
    """What each batch row gets of a modulation table."""
    return table.numpy()[step, case.at.row_of.numpy()]  # (R, D)


def patch_of(image: np.ndarray, s: Sizes, t: int) -> np.ndarray:
    """The pixels of token t as (C, p, p)."""
    y, x = (t // s.grid[1]) * s.patch, (t % s.grid[1]) * s.patch
    return image[:, y : y + s.patch, x : x + s.patch]


def numpy_embed(case: StepOperands) -> np.ndarray:
    s = case.sizes
    h = np.empty((s.rows, s.tokens, s.width))
    for r, t, d in np.ndindex(h.shape):
        patch = patch_of(case.x.numpy()[r % s.samples], s, t)
        h[r, t, d] = (
            (patch * case.patches.weight.numpy()[d]).sum() + case.patches.bias[d] + case.patches.positions[t, d]
        )
    return h


def numpy_norm(h: np.ndarray, case: StepOperands, step: int = STEP) -> np.ndarray:
    centred = h - h.mean(axis=2, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + case.norm.eps)
    return normed * (1 + vectors(case.norm.scale, case, step)[:, None]) + vectors(case.norm.shift, case, step)[:, None]


def numpy_predict(h: np.ndarray, case: StepOperands, step: int = STEP) -> np.ndarray:
    """Guided and scaled output of the stream after its last branches."""
    s = case.sizes
    features = numpy_norm(h, case, step) @ case.linear.weight.numpy().T + case.linear.bias.numpy()
    out = np.empty((s.rows, s.out_channels, *s.image))
    for r, t in np.ndindex(s.rows, s.tokens):
        tile = features[r, t].reshape(s.patch, s.patch, s.out_channels)
        patch_of(out[r], s, t)[:] = tile.transpose(2, 0, 1)
    scale, b = case.guide.settings.tolist()
    if s.copies == 2:
        for n in range(s.samples):
            cond, uncond = out[n, : s.guided].copy(), out[s.samples + n, : s.guided].copy()
            out[n, : s.guided] = out[s.samples + n, : s.guided] = uncond + scale * (cond - uncond)
    out[:, : s.channels] *= b
    return out


def numpy_update(case: StepOperands, out: np.ndarray, step: int = STEP) -> np.ndarray:
    """The latents, and behind them what is kept of them."""
    kept = case.update.previous
    if kept is None:
        return numpy_latents(case, out, step)
    px, pe = case.update.coefficients[step, 7:].tolist()
    eps = out[: case.sizes.samples, : case.sizes.channels]
    return np.concatenate([numpy_latents(case, out, step), px * case.x.numpy() + pe * eps])


def numpy_latents(case: StepOperands, out: np.ndarray, step: int) -> np.ndarray:
    s = case.sizes
    cx, ce, low, high, noise_on, sigma = case.update.coefficients[step, :6].tolist()
    x = cx * case.x.numpy() + ce * out[: s.samples, : s.channels]
    if case.update.previous is not None:
        x = x + float(case.update.coefficients[step, 6]) * case.update.previous.numpy()
    if case.update.noise is None:
        return x
    share = (out[: s.samples, s.channels :] + 1) / 2 if s.variance else 0.0
    deviation = noise_on * np.sqrt(np.exp(low + share * (high - low))) + sigma
    return x + deviation * case.update.noise[step].numpy()


def stream(case: StepOperands) -> np.ndarray:
    """h after its branches."""
    added = (vectors(g, case)[:, None] * b.numpy() for g, b in zip(case.gates, case.branches, strict=True))
    return case.h.numpy() + sum(added)


def assert_close(ours: Tensor, theirs: np.ndarray) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-11, atol=1e-11)


@EVERY_SIZE
def test_embed(sizes: Sizes) -> None:
    case = case_of(sizes)
    expected = numpy_embed(case)
    h, u = torch.empty_like(case.h), torch.empty_like(case.h)
    reference.embed_norm_modulate(case.x, case.patches, case.norm, case.at, h, u)
    assert_close(h, expected)
    assert_close(u, numpy_norm(expected, case))


@EVERY_SIZE
def test_head_predict(sizes: Sizes) -> None:
    case = case_of(sizes)
    before = case.h.clone()
    out = case.x.new_empty(sizes.rows, sizes.out_channels, *sizes.image)
    reference.head_predict(case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, out)
    assert_close(out, numpy_predict(stream(case), case))
    assert torch.equal(case.h, before)


@EVERY_SIZE
def test_head_update(sizes: Sizes) -> None:
    case = case_of(sizes)
    expected = numpy_update(case, numpy_predict(stream(case), case))
    reference.head_update(
        case.x, case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, case.update
    )
    assert_close(case.written, expected)


@EVERY_SIZE
def test_run_update(sizes: Sizes) -> None:
    case = case_of(sizes)
    run = case.clone()
    reference.run_update(run.x, run.sums, run.patches, run.norm, run.at, run.linear, run.guide, run.update)
    for j in range(3):
        out = numpy_predict(numpy_embed(case) + case.sums[j].numpy(), case, STEP + j)
        latents, *kept = np.split(numpy_update(case, out, STEP + j), 1 + sizes.memory)
        case.x.copy_(torch.from_numpy(latents))
        for one in kept:
            case.update.previous.copy_(torch.from_numpy(one))
    assert_close(run.written, case.written.numpy())


def test_linear_gelu() -> None:
    case = case_of(SIZES["plain"])
    u, linear = case.h.flatten(0, 1), Linear(case.linear.weight, case.linear.bias)
    out = u.new_empty(len(u), len(linear.weight))
    reference.linear_gelu(u, linear, out)
    z = u.numpy() @ linear.weight.numpy().T + linear.bias.numpy()
    assert_close(out, 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))))


def test_attention() -> None:
    rows, tokens, heads, size = 2, 5, 3, 4
    qkv = torch.randn(rows, tokens, 3 * heads * size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = qkv.new_empty(rows, tokens, heads * size)
    reference.attention(qkv, heads, out)
    packed = qkv.numpy().reshape(rows, tokens, 3, heads, size)
    for r, k in np.ndindex(rows, heads):
        q, key, value = (packed[r, :, i, k] for i in range(3))
        weights = np.exp(q @ key.T / math.sqrt(size))
        expected = weights / weights.sum(axis=1, keepdims=True) @ value
        assert_close(out[r, :, k * size : (k + 1) * size], expected)
