"""Latents as patches: which pixels belong to a token, and what a token is made of.

A program holds a tile of tokens of one sample as (ROWS, E): E elements a patch, ordered as the embedding's weight is,
element = (channel * P + row) * P + column, and padded to a power of two.
"""

import triton
import triton.language as tl

from ebcache_fast.kernels._stream import load


@triton.jit
def pixels(image, channels, token, element, size, P: tl.constexpr):
    """Offsets (ROWS, E) of a tile's pixels in images (N, channels, H, W)."""
    height, width = size
    across = width // P  # tokens in a row
    plane = (tl.cast(image, tl.int64) * channels + element // (P * P)) * height  # (E,)
    y = (token // across * P)[:, None] + (element % (P * P) // P)[None, :]
    x = (token % across * P)[:, None] + (element % P)[None, :]
    return (plane[None, :] + y) * width + x


@triton.jit
def embedded(latents, patches, token, col, D, keep_token, element, C: tl.constexpr, P: tl.constexpr):
    """Tokens (ROWS, COLS) of latents (ROWS, E): one linear map of a patch, and its position's embedding."""
    keep_col = col < D
    keep_weight = keep_col[:, None] & (element < C * P * P)[None, :]
    weight = tl.load(patches.weight + col[:, None] * (C * P * P) + element[None, :], mask=keep_weight, other=0.0)
    tokens = tl.dot(latents.to(weight.dtype), weight.T, input_precision="tf32x3")  # (COLS, E) before
    tokens += load(patches.bias, col, keep_col)[None, :]
    keep = keep_token[:, None] & keep_col[None, :]
    return tokens + load(patches.positions, token[:, None] * D + col[None, :], keep)
