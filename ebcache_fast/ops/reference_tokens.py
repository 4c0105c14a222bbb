"""The plain-torch truth of operations that mix or move tokens: copies, differences, tokens by score, attention.

Shapes as in `ebcache_fast.ops.reference`, which hands these on. Indices are (R, k) int32, distinct and rising in each
row: k is part of a step's program, so that shapes stay the same from step to step and a graph can be captured.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebcache_fast.errors import InputError


def copy(source: Tensor, out: Tensor) -> None:
    """Write source into out, of the same shape."""
    out.copy_(source)


def subtract(minuend: Tensor, subtrahend: Tensor, out: Tensor) -> None:
    """``minuend - subtrahend`` into out, which may be one of them; all of one shape.

    Source: the residuals that are shared in DiTFastAttn (Yuan et al., arXiv 2406.08552) and Delta-DiT (Chen et al.,
    arXiv 2406.01125).
    """
    torch.sub(minuend, subtrahend, out=out)


def select_tokens(scores: Tensor, k: int, indices: Tensor) -> None:
    """Indices of the k largest scores (R, T) of each row, rising -> indices (R, k) int32.

    The same in every run: of equal scores the first tokens are chosen, and -0.0 equals 0.0. A NaN is above all numbers,
    so that a token whose score is lost is computed and not left out. The host waits for nothing. Raises InputError for
    k outside of [1, T] and a choice of another shape. Source: ToCa (Zou et al., arXiv 2410.05317).
    """
    if not 1 <= k <= scores.shape[1] or indices.shape != (len(scores), k):
        raise InputError(
            f"{k} tokens of scores {tuple(scores.shape)} can't be chosen into {tuple(indices.shape)}; choose 1 to "
            f"{scores.shape[1]}, into (rows, tokens chosen)"
        )
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices  # a stable sort keeps ties in their order
    indices.copy_(order[:, :k].sort(dim=1).values)


def gather_tokens(source: Tensor, indices: Tensor, out: Tensor) -> None:
    """The chosen tokens of source (R, T, D) -> out (R, k, D): ``out[r, i] = source[r, indices[r, i]]``.

    Source: ToCa (Zou et al., arXiv 2410.05317).
    """
    torch.gather(source, 1, _channels(indices, source), out=out)


def scatter_tokens(source: Tensor, indices: Tensor, target: Tensor) -> None:
    """``target[r, indices[r, i]] = source[r, i]`` in place: source (R, k, D), target (R, T, D).

    The other tokens of target stay as they are. Source: ToCa (Zou et al., arXiv 2410.05317).
    """
    target.scatter_(1, _channels(indices, source), source)


def attention(qkv: Tensor, heads: int, out: Tensor) -> None:
    """Self-attention from packed projections qkv (R, T, 3 * D), as (3, heads, D / heads) -> out (R, T, D)."""
    rows, tokens, width = out.shape
    q, k, v = qkv.view(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # (R, heads, T, D / heads)
    out.view(rows, tokens, heads, -1).copy_(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, out: Tensor) -> None:
    """Attention of each token i to the tokens j with ``|i - j| <= window // 2``: q, k, v, out (N, heads, T, d).

    The window is a band over the order of tokens, not over places in the picture; a window of 1 is a token itself, one
    of 2 * T reaches all. Raises InputError for a window below 1. Source: DiTFastAttn (Yuan et al., arXiv 2406.08552),
    whose bounds of 64 tokens on either side are a window of 128 here.
    """
    if window < 1:
        raise InputError(f"a window of {window} tokens is empty; it must be 1 or more")
    place = torch.arange(q.shape[2], device=q.device)
    band = (place.unsqueeze(1) - place).abs() <= window // 2  # (T, T)
    out.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=band))


def _channels(indices: Tensor, tokens: Tensor) -> Tensor:
    """A choice (R, k) for every channel -> (R, k, D)."""
    return indices.long().unsqueeze(2).expand(-1, -1, tokens.shape[2])
