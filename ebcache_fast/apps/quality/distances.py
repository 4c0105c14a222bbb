"""Distances between two sets of features, and the diversity of one: no pictures, no models."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ebcache_fast.apps.quality.checks import checked
from ebcache_fast.errors import InputError

ROWS = 1024  # rows of a distance matrix held at once: 80 MB against 10,000 samples
EXACT = "donot_use_mm_for_euclid_dist"  # the matmul form gives equal points a distance of about 1e-8, not 0


@dataclass(frozen=True, eq=False)
class GaussianStats:
    """Mean (F,) and unbiased covariance (F, F) of n samples of F features, both float64 on the CPU.

    Raises InputError unless the shapes agree, the values are finite, the covariance is symmetric and n >= 2.
    """

    mean: Tensor
    cov: Tensor
    n: int

    def __post_init__(self) -> None:
        mean, cov = checked(self.mean, "mean", 1), checked(self.cov, "cov", 2)
        if self.mean.dtype != torch.float64 or self.cov.dtype != torch.float64:
            raise InputError(f"mean is {self.mean.dtype}, cov {self.cov.dtype}; both must be float64: call .double()")
        if tuple(cov.shape) != (mean.shape[0], mean.shape[0]):
            raise InputError(
                f"cov has shape {tuple(cov.shape)}; with mean {tuple(mean.shape)} it must be square and as "
                "wide: take both from one GaussianStats.from_features"
            )
        asymmetry = float((cov - cov.mT).abs().max())
        if asymmetry > 1e-9 * float(cov.abs().max()):
            raise InputError(f"cov differs from its transpose by {asymmetry:.3g}; it must be symmetric: recompute it")
        if self.n < 2:
            raise InputError(f"n is {self.n}; a covariance needs at least 2 samples: draw more samples")

    @classmethod
    def from_features(cls, x: Tensor) -> Self:
        """The statistics of x (N, F), N >= 2; InputError for a wrong shape or a non-finite value."""
        y = checked(x, "features", 2, least=2)
        mean = y.mean(dim=0)
        centred = y - mean
        return cls(mean, centred.mT @ centred / (y.shape[0] - 1), y.shape[0])

    def merge(self, other: Self) -> Self:
        """The statistics of both sample sets together (Chan, Golub and LeVeque 1983).

        Raises InputError if the widths differ.
        """
        _require_same_width(self, other)
        n = self.n + other.n
        delta = other.mean - self.mean
        between = torch.outer(delta, delta) * (self.n * other.n / n)
        scatter = self.cov * (self.n - 1) + other.cov * (other.n - 1) + between
        return type(self)(self.mean + delta * (other.n / n), scatter / (n - 1), n)


def _require_same_width(a: GaussianStats, b: GaussianStats) -> None:
    """Raises InputError unless both describe the same number of features."""
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"the statistics have {a.mean.shape[0]} and {b.mean.shape[0]} features; they must have as many: "
            "use one feature extractor for both"
        )


def _factor(cov: Tensor) -> Tensor:
    """L (F, rank) with L L^T = cov (F, F), which must be positive semi-definite; InputError if it is not."""
    values, vectors = torch.linalg.eigh(cov)
    largest = float(values[-1])
    if float(values[0]) < -1e-8 * abs(largest):
        raise InputError(f"cov has the eigenvalue {float(values[0]):.3g}; none may be negative: recompute it")
    # Below this an eigenvalue is rounding, and its root would be 1e8 times larger than rounding.
    kept = values > cov.shape[0] * torch.finfo(cov.dtype).eps * largest
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).

    Dowson and Landau 1982; Heusel et al. 2017. The root's trace is the sum of the singular values of A^T B,
    where A A^T = cov_a and B B^T = cov_b, so fewer samples than features are no trouble. The estimate grows
    as samples get fewer: compare at equal n only.
    Raises InputError if the widths differ or a covariance has a negative eigenvalue.
    """
    _require_same_width(a, b)
    overlap = torch.linalg.svdvals(_factor(a.cov).mT @ _factor(b.cov)).sum()
    shift = (a.mean - b.mean).square().sum()
    return max(0.0, float(shift + a.cov.trace() + b.cov.trace() - 2 * overlap))


def inception_score(logits: Tensor) -> float:
    """exp(E_x KL(p(y|x) || p(y))) of a classifier's logits (N, K), N >= 2: Salimans et al. 2016, one split.

    Between 1 (the classifier sees no difference) and K (it is always certain, all classes equally frequent).
    Raises InputError for a wrong shape or a non-finite value.
    """
    log_p = torch.log_softmax(checked(logits, "logits", 2, least=2), dim=1)  # (N, K)
    log_marginal = torch.logsumexp(log_p, dim=0) - math.log(log_p.shape[0])  # (K,)
    return float((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of features (N, F), (M, F): Kynkaanniemi et al. 2019, eq. 1 and 2.

    Each point carries a ball that reaches its k-th nearest neighbour in its own set. Precision is the share
    of fake points inside some real ball, recall the share of real points inside some fake ball. Both depend
    on N, M and k: compare at equal ones only.
    Raises InputError if the widths differ, k < 1, a set has k points or fewer, or a value is not finite.
    """
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1: use 3, as the paper does")
    x, y = (checked(points, name, 2, least=k + 1) for points, name in ((real, "real"), (fake, "fake")))
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"real has {x.shape[1]} features and fake {y.shape[1]}; they must have as many: "
            "use one feature extractor for both"
        )
    return _share_inside(y, x, k), _share_inside(x, y, k)


def _share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """The share of points inside at least one ball around a centre, out to its k-th nearest other centre."""
    # k + 1 because each centre is its own nearest, at exactly 0
    radii = torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(centres, centres)])  # (M,)
    inside = torch.cat([(d <= radii).any(dim=1) for d in _distances(points, centres)])  # (N,)
    return float(inside.double().mean())


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The Euclidean distances of x (N, F) from y (M, F), in blocks (at most ROWS, M)."""
    for start in range(0, x.shape[0], ROWS):
        yield torch.cdist(x[start : start + ROWS], y, compute_mode=EXACT)
