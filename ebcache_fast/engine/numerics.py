"""What torch is told about how to compute. A graph keeps that as it was when captured."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch

ATTENTION: tuple[Callable[[], bool], ...] = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)


class Numerics(NamedTuple):
    """All of it that decides what a step computes, or how exactly."""

    autocast: bool
    float32_matmul: str
    fp16_reduction: bool
    bf16_reduction: bool
    attention: tuple[bool, ...]  # which ways are allowed
    deterministic: bool

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """As it is set for this device."""
        cuda = torch.backends.cuda
        return cls(
            torch.is_autocast_enabled(device.type),
            cuda.matmul.fp32_precision,  # of torch's two ways to ask, the one that holds however it was set
            cuda.matmul.allow_fp16_reduced_precision_reduction,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
            tuple(is_allowed() for is_allowed in ATTENTION),
            torch.are_deterministic_algorithms_enabled(),
        )
