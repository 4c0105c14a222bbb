"""Operations over the stream, with operands of any sizes: residuals, sums, moved tokens, GELU, attention."""

import torch
from accuracy import DEVICE, DTYPES, draw
from kernel_operations import EPSILON, OF_ITS_OWN, Call, Form, Operation, step_index, with_mean, with_norm
from torch import Tensor

from ebcache_fast.kernels.attention import attention, window_attention
from ebcache_fast.kernels.gated_residual import (
    gated_residual,
    gated_residual_norm_modulate,
    gated_residual_norm_quantise,
)
from ebcache_fast.kernels.gated_sum import gated_sum
from ebcache_fast.kernels.linear_gelu import linear_gelu
from ebcache_fast.kernels.tokens import gather_tokens, scatter_tokens
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Linear, Norm, Quantised

HALVES = DTYPES[1:]
STEPS, CONDITIONS, STEP = 6, 2, 3  # of the tables, and the step that is asked for
Shape = tuple[int, ...]


def as_it_is(call: Call) -> Call:
    return call


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


# --------------------------------------------------------------------------------------------------------- residuals

STREAMS = [(1, 1, 1), (2, 5, 7), (3, 3, 96), (2, 7, 131), (5, 2, 144), (2, 3, 1152)]  # (R, T, D)


def residual(shape: Shape, count: int, dtype: torch.dtype) -> Call:
    """Vectors are views of one table, (S, vectors, U, D)."""
    table = draw(STEPS, 5, CONDITIONS, shape[-1], dtype=dtype, seed=2)
    return dict(
        h=draw(*shape, dtype=dtype, seed=1, scale=2.0),
        branches=[draw(*shape, dtype=dtype, seed=10 + k) for k in range(count)],
        gates=[table[:, k] for k in range(count)],
        at=step_index(shape[0], STEP, CONDITIONS),
        norm=Norm(table[:, 3], table[:, 4], 1e-6),
    )


def without_norm(shape: Shape, count: int, dtype: torch.dtype) -> Call:
    call = residual(shape, count, dtype)
    del call["norm"]
    return call


def with_norm_of_it(shape: Shape, count: int, dtype: torch.dtype) -> Call:
    return residual(shape, count, dtype) | dict(u=empty(*shape, dtype=dtype))


def with_float8(shape: Shape, count: int, dtype: torch.dtype) -> Call:
    values, scales = empty(*shape, dtype=torch.float8_e4m3fn), empty(*shape[:2], dtype=torch.float32)
    return residual(shape, count, dtype) | dict(u=Quantised(values, scales))


def constant(call: Call) -> Call:
    return call | dict(h=torch.full_like(call["h"], 3.0))


RESIDUAL = Operation(
    gated_residual,
    reference.gated_residual,
    without_norm,
    ([*STREAMS, (1, 2, 1031)], [1, 2]),
    ((3, 5, 48), 2),
    ("h",),
)
NARROW, WIDE = (2, 3, 19), (7, 1, 96)
RESIDUAL_NORM = Operation(
    gated_residual_norm_modulate,
    reference.gated_residual_norm_modulate,
    with_norm_of_it,
    (STREAMS, [0, 1, 2]),
    ((3, 5, 48), 2),
    ("h", "u"),
    {
        **{f"{dtype}, with parameters": Form((NARROW, 1), OF_ITS_OWN, dtype) for dtype in DTYPES},
        **{f"{dtype}, with a weight": Form((WIDE, 1), with_norm(weight=3), dtype) for dtype in DTYPES},
        "an epsilon that counts": Form(((2, 2, 24), 0), EPSILON),
        "a large mean": Form(((2, 3, 1152), 0), with_mean(1e3)),
        "a larger mean": Form(((2, 3, 1152), 0), with_mean(-3e4)),
        "a constant row": Form(((1, 2, 33), 0), constant),
    },
)
RESIDUAL_FLOAT8 = Operation(  # is judged by a measure of its own
    gated_residual_norm_quantise,
    reference.gated_residual_norm_quantise,
    with_float8,
    (STREAMS, [0, 2]),
    ((3, 5, 48), 2),
    ("h", "u.values", "u.scales"),
)

# -------------------------------------------------------------------------------------------------------------- sums


def gated(shape: Shape, form: tuple[int, bool], dtype: torch.dtype) -> Call:
    """Gates are a view of a table with shifts and scales between them."""
    steps, has_base = form
    table = draw(STEPS, shape[0], 3, CONDITIONS, shape[-1], dtype=dtype, seed=2)
    return dict(
        slots=draw(*shape, dtype=dtype, seed=1),
        gates=table[:, :, 2],
        at=step_index(shape[1], STEP, CONDITIONS),
        base=draw(*shape[1:], dtype=dtype, seed=3) if has_base else None,
        sums=empty(steps, *shape[1:], dtype=dtype),
    )


SUM = Operation(
    gated_sum,
    reference.gated_sum,
    gated,
    (
        [(1, 1, 1, 1), (2, 2, 5, 7), (5, 3, 3, 96), (3, 2, 7, 131), (56, 1, 2, 192)],  # (K, R, T, D)
        [(1, True), (2, False), (3, False), (3, True)],  # steps, and whether there is a base
    ),
    ((3, 2, 17, 24), (2, True)),
    ("sums",),
)

# ------------------------------------------------------------------------------------------------------------ tokens

CHOICES = [(1, 1, 1, 1), (2, 7, 3, 5), (3, 16, 16, 96), (4, 11, 1, 131), (2, 17, 9, 1152)]  # (R, T, k, D)


def choice(rows: int, tokens: int, k: int) -> Tensor:
    """Distinct indices (R, k) int32 in an order of their own, which no kernel may rely on."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, tokens, generator=generator).argsort(dim=1)[:, :k].int().contiguous().to(DEVICE)


def gathering(shape: Shape, dtype: torch.dtype) -> Call:
    rows, tokens, k, width = shape
    source = draw(rows, tokens, width, dtype=dtype, seed=1)
    return dict(source=source, indices=choice(rows, tokens, k), out=empty(rows, k, width, dtype=dtype))


def scattering(shape: Shape, dtype: torch.dtype) -> Call:
    rows, tokens, k, width = shape
    source, target = draw(rows, k, width, dtype=dtype, seed=2), draw(rows, tokens, width, dtype=dtype, seed=3)
    return dict(source=source, indices=choice(rows, tokens, k), target=target)


GATHER = Operation(
    gather_tokens, reference.gather_tokens, gathering, (CHOICES,), ((2, 5, 3, 24),), ("out",), moves_bits=True
)
SCATTER = Operation(
    scatter_tokens, reference.scatter_tokens, scattering, (CHOICES,), ((2, 5, 3, 24),), ("target",), moves_bits=True
)

# -------------------------------------------------------------------------------------------------------------- GELU


def linear_of(shape: Shape, dtype: torch.dtype) -> Call:
    rows, depth, cols = shape
    weight = draw(cols, depth, dtype=dtype, seed=2, scale=2 * depth**-0.5)
    return dict(
        u=draw(rows, depth, dtype=dtype, seed=1),
        linear=Linear(weight, draw(cols, dtype=dtype, seed=3)),
        out=empty(rows, cols, dtype=dtype),
    )


MATRICES = [(1, 1, 1), (3, 5, 7), (7, 131, 13), (67, 72, 200), (2, 1152, 144)]  # (M, D, F)
MANY_TILES = [(3, 48, 4608), (600, 8, 136), (1031, 3, 129)]  # across, more than one group of eight down, larger tiles
GELU = Operation(
    linear_gelu,
    reference.linear_gelu,
    linear_of,
    (MATRICES,),
    ((9, 40, 72),),
    ("out",),
    {f"many tiles {shape}": Form((shape,), as_it_is, torch.float16) for shape in MANY_TILES},
)

# --------------------------------------------------------------------------------------------------------- attention


def packed(shape: Shape, dtype: torch.dtype) -> Call:
    rows, tokens, heads, head = shape
    qkv = draw(rows, tokens, 3 * heads * head, dtype=dtype, seed=1)
    return dict(qkv=qkv, heads=heads, out=empty(rows, tokens, heads * head, dtype=dtype))


def windowed(shape: Shape, dtype: torch.dtype) -> Call:
    *shape, window = shape
    q, k, v = (draw(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    return dict(q=q, k=k, v=v, window=window, out=empty(*shape, dtype=dtype))


ATTENTION = Operation(
    attention,
    reference.attention,
    packed,
    (
        [  # (R, T, heads, head_dim)
            (1, 1, 1, 1), (2, 7, 3, 5), (3, 17, 2, 16), (2, 19, 3, 20), (2, 33, 2, 40), (1, 37, 2, 80), (1, 18, 2, 88),
            (2, 16, 1, 96), (1, 21, 1, 128), (1, 31, 16, 72),
        ],
    ),
    ((2, 11, 2, 48),),
    ("out",),
    {  # both tile sizes, whole and cut
        f"many tiles {shape}, {dtype}": Form((shape,), as_it_is, dtype)
        for shape in [(2, 131, 2, 72), (3, 347, 1, 24), (1, 64, 16, 72)]
        for dtype in HALVES
    },
)  # fmt: skip
WINDOW = Operation(
    window_attention,
    reference.window_attention,
    windowed,
    (
        [  # (N, heads, T, head_dim, window); the last of several tiles, in front and behind of which are others
            (1, 1, 1, 1, 1), (2, 3, 7, 5, 3), (2, 2, 33, 16, 64), (1, 2, 37, 20, 16), (1, 3, 50, 72, 15),
            (1, 1, 41, 128, 1), (2, 1, 67, 40, 30), (1, 1, 200, 24, 90),
        ],
    ),
    ((2, 3, 21, 24, 8),),
    ("out",),
)  # fmt: skip
