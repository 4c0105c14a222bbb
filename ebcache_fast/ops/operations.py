"""The only switch between torch and Triton: every fused operation is reached through an `Operations`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import GuidanceArgs, Linear, Norm, Patches, Quantised, StepIndex, Update

OLDEST_ARCH = (8, 0)  # Ampere: what the kernels are compiled and checked for, from here on
OLDEST_DEPENDENT_ARCH = (9, 0)  # Hopper
OLDEST_FLOAT8_ARCH = (8, 9)  # Ada
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Operations:
    """Implementation of every fused operation; signatures and meaning are those of `ebcache_fast.ops.reference`.

    None for one of the last two means that the model's own layers do it, through torch's libraries.
    """

    name: str
    embed: Callable[[Tensor, Patches, Tensor], None]
    embed_norm_modulate: Callable[[Tensor, Patches, Norm, StepIndex, Tensor, Tensor], None]
    gated_residual: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], StepIndex], None]
    gated_residual_norm_modulate: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Norm, StepIndex, Tensor], None]
    gated_residual_norm_quantise: Callable[
        [Tensor, Sequence[Tensor], Sequence[Tensor], Norm, StepIndex, Quantised],
        None,
    ]
    gated_sum: Callable[[Tensor, Tensor, StepIndex, Tensor | None, Tensor], None]
    head_predict: Callable[
        [Tensor, Sequence[Tensor], Sequence[Tensor], Norm, StepIndex, Linear, GuidanceArgs, Tensor],
        None,
    ]
    head_update: Callable[
        [Tensor, Tensor, Sequence[Tensor], Sequence[Tensor], Norm, StepIndex, Linear, GuidanceArgs, Update],
        None,
    ]
    run_update: Callable[[Tensor, Tensor, Patches, Norm, StepIndex, Linear, GuidanceArgs, Update], None]
    scaled_linear: Callable[[Quantised, Quantised, Tensor, Tensor], None]
    copy: Callable[[Tensor, Tensor], None]
    subtract: Callable[[Tensor, Tensor, Tensor], None]
    select_tokens: Callable[[Tensor, int, Tensor], None]
    gather_tokens: Callable[[Tensor, Tensor, Tensor], None]
    scatter_tokens: Callable[[Tensor, Tensor, Tensor], None]
    window_attention: Callable[[Tensor, Tensor, Tensor, int, Tensor], None]
    linear_gelu: Callable[[Tensor, Linear, Tensor], None] | None = None
    attention: Callable[[Tensor, int, Tensor], None] | None = None

    def implementations(self) -> dict[str, str]:
        """Implementation of each operation by name; some are left to torch's libraries."""
        named = (field.name for field in fields(self) if field.name != "name")
        return {name: self.name if getattr(self, name) else "torch's libraries" for name in named}


TORCH = Operations(
    name="torch",
    embed=reference.embed,
    embed_norm_modulate=reference.embed_norm_modulate,
    gated_residual=reference.gated_residual,
    gated_residual_norm_modulate=reference.gated_residual_norm_modulate,
    gated_residual_norm_quantise=reference.gated_residual_norm_quantise,
    gated_sum=reference.gated_sum,
    head_predict=reference.head_predict,
    head_update=reference.head_update,
    run_update=reference.run_update,
    scaled_linear=reference.scaled_linear,
    copy=reference.copy,
    subtract=reference.subtract,
    select_tokens=reference.select_tokens,
    gather_tokens=reference.gather_tokens,
    scatter_tokens=reference.scatter_tokens,
    window_attention=reference.window_attention,
)


def triton_operations(*, pdl: bool = False) -> Operations:
    """The Triton kernels; matrix products, attention, copies, differences and choices stay with torch's libraries.

    pdl: programmatic dependent launch: each kernel is launched while the one before it still runs, and waits for it on
        the card.
    """
    from ebcache_fast.kernels import embed, gated_residual, gated_sum, head, run, tokens

    return Operations(
        name="triton",
        embed=partial(embed.embed, pdl=pdl),
        embed_norm_modulate=partial(embed.embed_norm_modulate, pdl=pdl),
        gated_residual=partial(gated_residual.gated_residual, pdl=pdl),
        gated_residual_norm_modulate=partial(gated_residual.gated_residual_norm_modulate, pdl=pdl),
        gated_residual_norm_quantise=partial(gated_residual.gated_residual_norm_quantise, pdl=pdl),
        gated_sum=partial(gated_sum.gated_sum, pdl=pdl),
        head_predict=partial(head.head_predict, pdl=pdl),
        head_update=partial(head.head_update, pdl=pdl),
        run_update=partial(run.run_update, pdl=pdl),
        scaled_linear=_scaled_mm,
        copy=reference.copy,
        subtract=reference.subtract,
        select_tokens=reference.select_tokens,
        gather_tokens=partial(tokens.gather_tokens, pdl=pdl),
        scatter_tokens=partial(tokens.scatter_tokens, pdl=pdl),
        window_attention=reference.window_attention,
        linear_gelu=_addmm_gelu,
    )


def own_matmul_operations() -> Operations:
    """The Triton kernels, attention and the first half of the MLP among them: not the default until measured."""
    from ebcache_fast.kernels import attention, linear_gelu

    return replace(
        triton_operations(),
        linear_gelu=linear_gelu.linear_gelu,
        attention=attention.attention,
        window_attention=attention.window_attention,
    )


def select(device: torch.device, dtype: torch.dtype, *, pdl: bool = False) -> Operations:
    """Choose the operations for a model of this dtype on this device: Triton's wherever they run, else torch's.

    On a GPU without them that is said, once. Raises InputError for ``pdl`` where no kernel can be launched so.
    """
    reason = why_torch(device, dtype)
    if pdl and (reason or torch.cuda.get_device_capability(device) < OLDEST_DEPENDENT_ARCH):
        raise InputError(
            "pdl=True needs the Triton kernels and compute capability 9.0 or above, "
            f"and here is {reason or device}; leave it out"
        )
    if reason is None:
        return triton_operations(pdl=pdl)
    if device.type == "cuda":
        say_once(reason)
    return TORCH


def why_torch(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason, in a few words, for torch's operations on this device in this dtype; None where Triton's run."""
    if device.type != "cuda":
        return f"a {device.type} device"
    if dtype not in TRITON_DTYPES:
        return f"{dtype} has no kernels"
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import_module("triton")
    except Exception as error:  # whatever a broken installation may raise
        return f"Triton can't be imported ({type(error).__name__}: {error})"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_ARCH:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def why_not_float8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason, in a few words, against float8 products of a model of this dtype there; None where it has them.

    On a CPU they are torch's reference, for tests and to measure their error: nothing is gained.
    """
    if device.type == "cpu":
        return None
    if (reason := why_torch(device, dtype)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_FLOAT8_ARCH:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.9"
    # Products scaled by rows come in other dtypes on some cards only.
    return None if dtype == torch.bfloat16 else f"the model is {dtype} and not torch.bfloat16"


@cache
def say_once(reason: str) -> None:
    """Warn that torch's operations run; once for each reason."""
    logging.getLogger(__name__).warning("torch operations run instead of the Triton kernels: %s", reason)


def _scaled_mm(u: Quantised, weight: Quantised, bias: Tensor, out: Tensor) -> None:
    """cuBLASLt's or CUTLASS's float8 product, by torch's choice, with scales and bias in its epilogue.

    The tensor cores add up as fast as they can, with about 14 bits: far finer than what they multiply.
    """
    scales = u.scales.unsqueeze(1), weight.scales.unsqueeze(0)  # (M, 1), (1, F)
    bias = bias.contiguous()
    torch._scaled_mm(u.values, weight.values.t(), *scales, bias=bias, out_dtype=out.dtype, use_fast_accum=True, out=out)


def _addmm_gelu(u: Tensor, linear: Linear, out: Tensor) -> None:
    """cuBLASLt's matrix product with bias and tanh-GELU in its epilogue; on a CPU its GELU would be the exact one."""
    torch._addmm_activation(linear.bias, u, linear.weight.t(), use_gelu=True, out=out)
