"""The only switch between torch and Triton: every fused operation is reached through this module.

Until the Triton kernels land, each operation is its torch reference.
"""

from ebcache_fast.reference import (
    gated_residual,
    gated_residual_norm_modulate,
    gated_sum,
    guide,
    head_tokens,
    norm_modulate,
    sampler_update,
)

BACKEND = "torch"
OPERATIONS = (
    gated_residual,
    gated_residual_norm_modulate,
    gated_sum,
    guide,
    head_tokens,
    norm_modulate,
    sampler_update,
)

__all__ = [
    "BACKEND",
    "OPERATIONS",
    "gated_residual",
    "gated_residual_norm_modulate",
    "gated_sum",
    "guide",
    "head_tokens",
    "norm_modulate",
    "sampler_update",
]
