"""The launches that `bench.kernel_resources` compiles without a GPU, and what each must come to.

A case makes tensors on the device it is given and calls a launcher as the engine does. The device is meta, so nothing
is allocated and nothing runs; addresses count from 0, so a slice is as aligned as on a GPU. Types, alignments,
constants and launch parameters stand nowhere but in the kernels and their launchers. To add a kernel, add a line to
`CALLS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch

from bench.kernel_operands import LETTERS, PATCH_8, WIDE, XL_256, KernelOperands, ModelSizes
from ebcache_fast.kernels.attention import attention, window_attention
from ebcache_fast.kernels.embed import embed, embed_norm_modulate
from ebcache_fast.kernels.gated_residual import (
    gated_residual,
    gated_residual_norm_modulate,
    gated_residual_norm_quantise,
)
from ebcache_fast.kernels.gated_sum import gated_sum
from ebcache_fast.kernels.head import head_predict, head_update
from ebcache_fast.kernels.linear_gelu import linear_gelu
from ebcache_fast.kernels.run import run_update
from ebcache_fast.kernels.tokens import gather_tokens, scatter_tokens
from ebcache_fast.ops.operands import Linear
from ebcache_fast.ops.operations import triton_operations

Call = Callable[[KernelOperands], None]

# 86, 89 and 120 launch as 80 does, but for what their smaller shared memory forbids, and 89 takes the code of 86: each
# dtype is compiled for one of the two.
OF_A_KIND = (80, 90, 100)
WITH_86, WITH_89 = (80, 86, 90, 100, 120), (80, 89, 90, 100, 120)
OF_SMALL_MEMORY = (86,)


@dataclass(frozen=True)
class Case:
    """One call of a launcher, and what must hold of every kernel that it launches.

    No case may spill, use a stack or global scratch, or exceed its architecture's memories: that is not said here.
    """

    name: str  # unlike all others
    launch: Callable[[torch.device], None]
    vectorised: bool = True  # its widest global load has 128 bit or more, or is TMA's
    most_narrow_loads: int | None = None  # at most so many load instructions below 128 bit; None for any number
    wgmma: bool = False  # products run on the architecture's own unit: wgmma on sm_90, tcgen05 on sm_100
    tma: bool = False  # loads go through TMA, where there is one: not on sm_80
    waits: bool = False  # for the kernel before it, ahead of any access to memory
    archs: tuple[int, ...] = OF_A_KIND  # that it is compiled for


def _residual(o: KernelOperands) -> None:
    gated_residual(o.h, [o.first, o.second], [o.gates[:, 0], o.gates[:, 1]], o.at)


def _residual_norm(o: KernelOperands) -> None:
    gated_residual_norm_modulate(o.h, [o.first], [o.gates[:, 0]], o.norm, o.at, o.u)


def _residual_norm_of_two(o: KernelOperands) -> None:
    gated_residual_norm_modulate(o.h, [o.first, o.second], [o.gates[:, 0], o.gates[:, 1]], o.norm, o.at, o.u)


def _residual_norm_in_float8(o: KernelOperands) -> None:
    gated_residual_norm_quantise(o.h, [o.first], [o.gates[:, 0]], o.norm, o.at, o.quantised())


def _norm(o: KernelOperands) -> None:
    gated_residual_norm_modulate(o.h, [], [], o.norm, o.at, o.u)


def _head_update(o: KernelOperands) -> None:
    head_update(o.x, o.h, [o.first], [o.gates[:, 0]], o.head_norm, o.at, o.linear, o.guide, o.update)


def _head_update_without_noise(o: KernelOperands) -> None:
    quiet = o.update._replace(noise=None)
    head_update(o.x, o.h, [o.first], [o.gates[:, 0]], o.head_norm, o.at, o.linear, o.guide, quiet)


def _head_update_with_memory(o: KernelOperands) -> None:
    head_update(o.x, o.h, [o.first], [o.gates[:, 0]], o.head_norm, o.at, o.linear, o.guide, o.solver_update)


def _run_update_with_memory(o: KernelOperands) -> None:
    run_update(o.x, o.sums(3), o.patches, o.head_norm, o.at, o.linear, o.guide, o.solver_update)


def _gather(o: KernelOperands) -> None:
    chosen = o.chosen()
    gather_tokens(o.h, chosen, o.draw(*chosen.shape, o.model.width))


def _scatter(o: KernelOperands) -> None:
    chosen = o.chosen()
    scatter_tokens(o.draw(*chosen.shape, o.model.width), chosen, o.h)


def _linear_gelu(o: KernelOperands) -> None:
    wide = Linear(o.draw(o.model.hidden, o.model.width), o.draw(o.model.hidden))
    linear_gelu(o.u.flatten(0, 1), wide, o.draw(o.rows * o.model.tokens, o.model.hidden))


def _attention(o: KernelOperands) -> None:
    attention(o.draw(o.rows, o.model.tokens, 3 * o.model.width), o.model.heads, o.u)


def _window_attention(o: KernelOperands) -> None:
    """Of half the tokens, as DiTFastAttn's at this size; the projections are packed, and out is what comes next."""
    heads = o.rows, o.model.tokens, o.model.heads, o.model.width // o.model.heads
    q, k, v = o.draw(*heads[:2], 3, *heads[2:]).permute(2, 0, 3, 1, 4)  # (R, heads, T, D / heads)
    window_attention(q, k, v, o.model.tokens // 2, o.u.view(heads).transpose(1, 2))


CALLS: dict[str, Call] = {
    "residual": _residual,
    "residual, norm": _residual_norm,
    "2 residuals, norm": _residual_norm_of_two,
    "norm": _norm,
    "residual, norm, float8": _residual_norm_in_float8,
    "sum for 1 step": lambda o: gated_sum(o.slots(), o.gates, o.at, o.h, o.sums(1)),
    "sum for 2 steps": lambda o: gated_sum(o.slots(), o.gates, o.at, None, o.sums(2)),
    "sum for 3 steps": lambda o: gated_sum(o.slots(), o.gates, o.at, None, o.sums(3)),
    "embed": lambda o: embed(o.x, o.patches, o.h),
    "embed, norm": lambda o: embed_norm_modulate(o.x, o.patches, o.norm, o.at, o.h, o.u),
    "head": lambda o: head_predict(o.h, [o.first], [o.gates[:, 0]], o.head_norm, o.at, o.linear, o.guide, o.out),
    "head, DDPM": _head_update,
    "head, DDIM": _head_update_without_noise,
    "head, DPM-Solver++": _head_update_with_memory,
    "run of 3 steps": lambda o: run_update(o.x, o.sums(3), o.patches, o.head_norm, o.at, o.linear, o.guide, o.update),
    "run of 3 steps, DPM-Solver++": _run_update_with_memory,
    "gather": _gather,
    "scatter": _scatter,
    "linear, GELU": _linear_gelu,
    "attention": _attention,
    "window attention": _window_attention,
}
OWN_MATMULS = ("linear, GELU", "attention", "window attention")
WITH_MEMORY = ("head, DPM-Solver++", "run of 3 steps, DPM-Solver++")  # the same kernels: compiled at one size alone
SUMS = ("sum for 1 step", "sum for 2 steps", "sum for 3 steps")
ENDS = ("embed", "embed, norm", "head", "head, DDPM", "head, DDIM", "run of 3 steps")
TOKENS = ("gather", "scatter")
LAUNCHED_BY_ROWS = (
    "residual",
    "residual, norm",
    "2 residuals, norm",
    "norm",
    "residual, norm, float8",
    *TOKENS,
    *OWN_MATMULS,
)
FLOAT8 = "residual, norm, float8"
FLOAT8_ARCHS = (89, 90, 100, 120)


def _case(name: str, model: ModelSizes, samples: int, dtype: torch.dtype, archs: tuple[int, ...] = OF_A_KIND) -> Case:
    """A call at one size. The MLP's products must run on the card's own unit, through TMA where it has one.

    Rows of 96 channels are too few for every thread of a program to load 128 bit.
    """
    label = f"{name} / {model.name}, B={samples}, {str(dtype).removeprefix('torch.')}"
    gemm = name == "linear, GELU" and dtype != torch.float32
    return Case(
        label,
        lambda device: CALLS[name](KernelOperands(model, samples, dtype, device)),
        vectorised=model is not LETTERS,
        wgmma=gemm,
        tma=gemm,
        archs=FLOAT8_ARCHS if name == FLOAT8 else archs,
    )


def _launch_early(name: str, device: torch.device) -> None:
    operands = KernelOperands(XL_256, 1, torch.bfloat16, device)
    operations = triton_operations(pdl=True)
    launchers = {name: launcher for name, launcher in vars(operations).items() if name in globals()}
    with patch.multiple(__name__, **launchers):
        CALLS[name](operands)


def _early_case(name: str) -> Case:
    """A call at DiT-XL/2's size that is launched while the kernel before it still runs."""
    return Case(
        f"{name} / {XL_256.name}, B=1, bfloat16, early",
        partial(_launch_early, name),
        waits=True,
        archs=(90, 100),
    )


CASES: tuple[Case, ...] = (
    *(_case(name, XL_256, 1, torch.bfloat16, WITH_86) for name in CALLS),
    *(_case(name, XL_256, 32, torch.bfloat16) for name in LAUNCHED_BY_ROWS),
    *(_case(name, XL_256, 1, torch.float32) for name in ENDS),
    *(_case(name, LETTERS, 4, torch.float32, WITH_89) for name in CALLS if name not in WITH_MEMORY),
    *(_case(name, XL_256, 1, torch.float16, OF_SMALL_MEMORY) for name in (*SUMS, *ENDS, *OWN_MATMULS)),
    *(_case(name, PATCH_8, 1, torch.bfloat16, OF_SMALL_MEMORY) for name in ENDS),
    *(_case(name, WIDE, 32, torch.float32, OF_SMALL_MEMORY) for name in ("residual", "2 residuals, norm")),
    *(_early_case(name) for name in CALLS if name not in (*OWN_MATMULS, *WITH_MEMORY)),
)
