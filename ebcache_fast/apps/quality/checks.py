"""The input checks that the quality measures share."""

import torch
from torch import Tensor

from ebcache_fast.errors import InputError


def checked(x: Tensor, name: str, dims: int, least: int = 1) -> Tensor:
    """`x` detached, on the CPU in float64, once it is known to be a finite float tensor of `dims` dimensions.

    Raises InputError for another dtype or shape, fewer than `least` rows, empty rows, or a non-finite value.
    """
    if not x.is_floating_point():
        raise InputError(f"{name} has dtype {x.dtype}; it must be a floating dtype: convert it with .float()")
    if x.dim() != dims:
        raise InputError(
            f"{name} has shape {tuple(x.shape)}; it must have {dims} dimensions, samples first: reshape it"
        )
    if x.shape[0] < least:
        raise InputError(f"{name} has {x.shape[0]} samples; it must have at least {least}: draw more samples")
    if 0 in x.shape[1:]:
        raise InputError(f"{name} has shape {tuple(x.shape)}; no dimension may be 0: pass at least one value a sample")
    y = x.detach().cpu().double()  # moved first: not every device has float64
    bad = int((~torch.isfinite(y)).sum())
    if bad:
        raise InputError(f"{name} has {bad} non-finite values; all must be finite: look for overflow in the sampler")
    return y


def checked_labels(labels: Tensor, samples: int, classes: int) -> Tensor:
    """`labels` (N,) as int64 on the CPU, once it is known to hold one class in [0, classes) for each sample.

    Raises InputError for another dtype, shape or range.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels have dtype {labels.dtype}; it must be an integer dtype: convert them with .long()")
    if tuple(labels.shape) != (samples,):
        raise InputError(f"labels have shape {tuple(labels.shape)}; it must be ({samples},): pass one label a sample")
    y = labels.detach().cpu().long()
    outside = y[(y < 0) | (y >= classes)]
    if outside.numel():
        raise InputError(f"label {int(outside[0])} is outside 0..{classes - 1}: pass class indices of the classifier")
    return y
