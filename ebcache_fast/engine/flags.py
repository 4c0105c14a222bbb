"""Global flags and functions of torch that change results; a graph keeps both as they were when it was captured."""

import sys
from collections.abc import Callable
from functools import partial
from operator import attrgetter, call
from typing import NamedTuple, Self

import torch
from torch.nn import functional
from torch.nn.modules import module

Functions = tuple[object, ...]

# Everything is looked up at every call, so by torch's own getters and not through the properties around them. Of
# precision torch has two ways to be told; these hold however it was.
PRECISIONS: tuple[Callable[[], object], ...] = tuple(
    partial(torch._C._get_fp32_precision_getter, backend, kind)
    for backend, kinds in {"generic": ["all"], "cuda": ["all", "matmul", "conv"], "mkldnn": ["matmul", "conv"]}.items()
    for kind in kinds
)
NAMES = (
    *(f"_get_cublas_allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")),  # and in split-k sums
    *("_get_cublas_allow_fp16_accumulation", "_get_math_sdp_allow_fp16_bf16_reduction"),
    *(f"_get_{way}_sdp_enabled" for way in ("flash", "fa3", "mem_efficient", "math", "cudnn", "overrideable")),
    *(f"_get_{which}_preferred_backend" for which in ("blas", "linalg", "rocm_fa")),
    *(f"_get_cudnn_{what}" for what in ("enabled", "benchmark", "deterministic", "depthwise_kernel")),
    *("_cuda_get_cudnn_benchmark_limit", "_cuda_tunableop_is_enabled", "_get_sm_carveout_experimental"),
    *(f"_get_mkldnn_{what}" for what in ("enabled", "deterministic")),
    *(f"_get_deterministic_{what}" for what in ("algorithms", "algorithms_warn_only", "fill_uninitialized_memory")),
)
SWITCHES = tuple(getattr(torch._C, name) for name in NAMES if hasattr(torch._C, name))  # others this build has not
ATTENTION = torch.nn.attention
FLASH: tuple[Callable[[], object], ...] = (getattr(ATTENTION, "current_flash_attention_impl", lambda: None),)
SETTINGS: tuple[Callable[[], object], ...] = (*PRECISIONS, *SWITCHES, *FLASH, torch.get_default_dtype)

# What layers, and the engine, call by name.
OF_FUNCTIONAL = attrgetter(
    *("conv2d", "conv3d", "dropout", "embedding", "gelu", "group_norm", "layer_norm", "linear", "normalize", "relu"),
    *("rms_norm", "scaled_dot_product_attention", "sigmoid", "silu", "softmax", "tanh"),
)
OF_TORCH = attrgetter(
    *("add", "addcmul", "addmm", "arange", "baddbmm", "bmm", "cat", "chunk", "concat", "cos", "einsum", "exp"),
    *("matmul", "meshgrid", "mm", "mul", "outer", "rsqrt", "sin", "softmax", "split", "stack"),
    *("_addmm_activation", "_scaled_mm"),
)
DISPATCH, EMBEDDINGS = "diffusers.models.attention_dispatch", "diffusers.models.embeddings"


class Flags(NamedTuple):
    """Global torch flags that change results (autocast, TF32, reduced-precision sums, SDPA backends), and functions.

    A part of a graph's key.
    """

    autocast: tuple[object, ...]  # nothing where it is off
    settings: tuple[object, ...]
    attention_order: tuple[int, ...]  # which of its ways is tried first
    functions: Functions  # that layers find, in whose place others may be put, and hooks on all modules

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """The flags and functions as they are set now, for this device."""
        kind = device.type
        casts = torch.is_autocast_enabled(kind)
        autocast = (torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()) if casts else ()
        order = tuple(torch._C._get_sdp_priority_order())
        of_diffusers = _of_diffusers() if EMBEDDINGS in sys.modules or DISPATCH in sys.modules else ()
        hooks = (*module._global_forward_pre_hooks.values(), *module._global_forward_hooks.values())
        functions = (*OF_FUNCTIONAL(functional), *OF_TORCH(torch), *of_diffusers, *hooks)
        return cls(autocast, tuple(map(call, SETTINGS)), order, functions)


def _of_diffusers() -> Functions:
    """Functions that attention processors of diffusers find: the active backend's, and how it is called."""
    dispatch = sys.modules.get(DISPATCH)
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    active = getattr(registry, "_active_backend", None)
    rotary = getattr(sys.modules.get(EMBEDDINGS), "apply_rotary_emb", None)
    backends = getattr(registry, "_backends", {})
    return active, backends.get(active), getattr(dispatch, "dispatch_attention_fn", None), rotary
