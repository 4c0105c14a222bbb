"""Measures of single samples: contrast, recognition, and the error against the uncached sample."""

import torch
from torch import Tensor

from ebcache_fast.apps.quality.checks import checked, checked_labels
from ebcache_fast.errors import InputError


def contrast(images: Tensor) -> Tensor:
    """RMS contrast of each picture (N, C, H, W) as (N,) float64, in the pictures' own units.

    The root of the variance over the pixels (divisor H*W), averaged over the channels. Brightness and a flat
    tint do not count, fading colour does even at constant luminance; an orthonormal change of the colour
    basis leaves it as it is.
    Raises InputError for a wrong shape or a non-finite value.
    """
    pixels = checked(images, "images", 4).flatten(2)  # (N, C, H*W)
    return pixels.var(dim=2, correction=0).mean(dim=1).sqrt()


def paired_error(images: Tensor, reference: Tensor) -> Tensor:
    """RMS difference of each sample from its reference, over that one's RMS: (N, C, H, W) twice -> (N,).

    The result is float64. The reference is the uncached sample of the same noise and label.
    Raises InputError for unequal shapes, an all-zero reference, or a non-finite value.
    """
    x, r = (checked(t, name, 4) for t, name in ((images, "images"), (reference, "reference")))
    if x.shape != r.shape:
        raise InputError(
            f"images have shape {tuple(x.shape)} and reference {tuple(r.shape)}; they must be equal: "
            "sample both with the same labels and seed"
        )
    size: Tensor = torch.linalg.vector_norm(r.flatten(1), dim=1)
    if not bool((size > 0).all()):
        row = int(size.argmin())
        raise InputError(f"reference {row} has norm 0; it must be above 0: leave out all-zero samples")
    difference: Tensor = torch.linalg.vector_norm((x - r).flatten(1), dim=1)
    return difference / size


def recognition(logits: Tensor, labels: Tensor) -> Tensor:
    """Recognition of each sample, its largest logit (N, K) at its label (N,), integer: (N,) float64.

    1 or 0; and, so that no class is favoured, 1/n where n logits are the largest together and the label's is one of
    them, what a guess would get. Raises InputError for wrong shapes, a label outside 0..K-1, or a non-finite value.
    """
    scores = checked(logits, "logits", 2)
    y = checked_labels(labels, scores.shape[0], scores.shape[1])
    largest = (scores == scores.amax(dim=1, keepdim=True)).double()
    return (largest / largest.sum(dim=1, keepdim=True)).gather(1, y[:, None]).squeeze(1)


def recognised(logits: Tensor, labels: Tensor) -> float:
    """The mean `recognition` of samples with these logits (N, K) and labels (N,); raises as that does."""
    return float(recognition(logits, labels).mean())


def recognised_by_class(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`recognised` for each class alone: (classes,) float64, NaN for a class that no sample has.

    Raises InputError like `recognition`, and if the logits are not `classes` wide.
    """
    hits = recognition(logits, labels)
    if logits.shape[1] != classes:
        raise InputError(f"classes is {classes}; it must be {logits.shape[1]}, the width of the logits: pass that")
    y = labels.detach().cpu().long()
    return torch.bincount(y, weights=hits, minlength=classes) / torch.bincount(y, minlength=classes)
