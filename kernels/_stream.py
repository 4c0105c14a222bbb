"""Pieces that kernels over the residual stream share: a row's modulation vectors, and the gated residual itself.

The stream h is (R, T, D), here M = R * T rows of D channels. Everything is computed in float32.
"""

import triton
import triton.language as tl


@triton.jit
def vector_offsets(batch_row, keep, at, strides):
    """Offsets of batch rows' modulation vectors in a table (S, U, D), by the strides of its first two dimensions."""
    step = tl.load(at.step).to(tl.int64)
    condition = tl.load(at.row_of + batch_row, mask=keep, other=0).to(tl.int64)
    return step * strides[0] + condition * strides[1]


@triton.jit
def load(tensor, offsets, keep):
    """A tile in float32, 0 where it is not kept."""
    return tl.load(tensor + offsets, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def residual(h, branches, gates, stream_offsets, gate_offsets, keep):
    """A tile of ``h + sum_k gates[k] * branches[k]``."""
    total = load(h, stream_offsets, keep)
    for k in tl.static_range(len(branches)):
        total += load(gates[k], gate_offsets, keep) * load(branches[k], stream_offsets, keep)
    return total


@triton.jit
def modulate(normed, norm, start, col, keep):
    """``normed * (1 + scale) + shift``, after the norm's own weight and bias; vectors start at ``start``."""
    if norm.weight is not None:
        normed *= load(norm.weight, tl.broadcast_to(col, keep.shape), keep)
    if norm.bias is not None:
        normed += load(norm.bias, tl.broadcast_to(col, keep.shape), keep)
    offsets = start + col
    return normed * (1.0 + load(norm.scale, offsets, keep)) + load(norm.shift, offsets, keep)


@triton.jit
def quotient(a, b):
    """``a / b`` of float32, to nearest but for rare cases, where Triton's own division may be two units off.

    So the mean of equal numbers is that number, and nothing is left over of a large one. One step of Newton's does it;
    IEEE's division is a call, and takes registers.
    """
    inverse = 1.0 / b
    guess = a * inverse
    return tl.fma(tl.fma(-guess, b, a), inverse, guess)


@triton.jit
def merge_statistics(count, mean, squares, tile, keep, fresh):
    """Mean and sum of squared deviations of ``count + fresh`` channels, from those of ``count`` and a new tile.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    No sum of squares is taken, so that a large mean costs no digits.
    """
    share = quotient(fresh, count + fresh)
    tile_mean = quotient(tl.sum(tile, axis=1), fresh)
    centred = tl.where(keep, tile - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    return mean + delta * share, squares + tl.sum(centred * centred, axis=1) + delta * delta * (count * share)
