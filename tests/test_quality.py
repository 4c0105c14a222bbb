"""Quality measures against cases solved by hand, independent formulas, and what must not change them."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebcache_fast.apps import quality
from ebcache_fast.apps.quality import GaussianStats, distances
from ebcache_fast.errors import InputError

few = settings(max_examples=25)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gaussian(mean: list[float], cov: list[list[float]]) -> GaussianStats:
    return GaussianStats(torch.tensor(mean, dtype=torch.float64), torch.tensor(cov, dtype=torch.float64), n=10)


def orthogonal(size: int, seed: int = 0) -> Tensor:
    q: Tensor = torch.linalg.qr(normal(size, size, seed=seed)).Q
    return q


# --- Gaussian statistics


def test_statistics_are_numpys() -> None:
    x = 3 * normal(50, 7) + 5
    stats = GaussianStats.from_features(x.float())
    assert stats.n == 50
    assert stats.mean.dtype == stats.cov.dtype == torch.float64
    np.testing.assert_allclose(stats.mean, x.float().double().mean(dim=0), rtol=1e-13)
    np.testing.assert_allclose(stats.cov, np.cov(x.float().double().numpy(), rowvar=False), rtol=1e-12)


@few
@given(seed=seeds, left=st.integers(2, 20), right=st.integers(2, 20))
def test_merged_statistics_are_those_of_all_samples(seed: int, left: int, right: int) -> None:
    x = normal(left + right, 4, seed=seed) + 10
    merged = GaussianStats.from_features(x[:left]).merge(GaussianStats.from_features(x[left:] - 3))
    whole = GaussianStats.from_features(torch.cat([x[:left], x[left:] - 3]))
    assert merged.n == whole.n
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianStats.from_features(torch.zeros(1, 3)), "at least 2"),
        (lambda: GaussianStats.from_features(torch.zeros(4)), "2 dimensions"),
        (lambda: GaussianStats.from_features(torch.zeros(4, 0)), "no dimension may be 0"),
        (lambda: GaussianStats.from_features(torch.zeros(4, 2, dtype=torch.int64)), "floating dtype"),
        (lambda: GaussianStats.from_features(torch.tensor([[1.0], [math.inf]])), "1 non-finite"),
        (lambda: GaussianStats(torch.zeros(2), torch.eye(2), 5), "float64"),
        (lambda: replace(gaussian([0], [[1]]), n=1), "at least 2"),
        (lambda: gaussian([0, 0], [[1]]), "square"),
        (lambda: gaussian([0, 0], [[1, 0.1], [0.2, 1]]), "symmetric"),
        (lambda: gaussian([0], [[1]]).merge(gaussian([0, 0], [[1, 0], [0, 1]])), "1 and 2 features"),
    ],
)
def test_malformed_statistics_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# --- Frechet distance


def test_frechet_distance_of_a_hand_made_pair() -> None:
    # tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for a 2x2 M; here M = A B has trace 10 and determinant 12
    a = gaussian([1, 2], [[2, 1], [1, 2]])
    b = gaussian([0, 4], [[1, 0], [0, 4]])
    expected = (1 + 4) + (4 + 5) - 2 * math.sqrt(10 + 2 * math.sqrt(12))
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_in_one_dimension() -> None:
    a, b = gaussian([3], [[4]]), gaussian([-1], [[25]])
    assert quality.frechet_distance(a, b) == pytest.approx(16 + (2 - 5) ** 2, rel=1e-14)


@few
@given(seed=seeds)
def test_frechet_distance_of_covariances_with_common_axes(seed: int) -> None:
    size = 12
    q, spreads = orthogonal(size, seed), normal(2, size, seed=seed).exp()
    covs = [(q * s.square()) @ q.mT for s in spreads]
    a, b = (GaussianStats(torch.zeros(size, dtype=torch.float64), (c + c.mT) / 2, 9) for c in covs)
    expected = float((spreads[0] - spreads[1]).square().sum())
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


@few
@given(seed=seeds)
def test_frechet_distance_equals_the_eigenvalue_formula(seed: int) -> None:
    """numpy's eigenvalues of the unsymmetric product cov_a cov_b share no step with the implementation."""
    a = GaussianStats.from_features(normal(60, 10, seed=seed) @ normal(10, 10, seed=seed + 1))
    b = GaussianStats.from_features(normal(45, 10, seed=seed + 2) @ normal(10, 10, seed=seed + 3) + 1)
    roots = np.sqrt(np.linalg.eigvals(a.cov.numpy() @ b.cov.numpy()).real).sum()
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * roots)
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2])
def test_frechet_distance_of_rank_one_covariances(angle: float) -> None:
    u, v = orthogonal(30)[:2]
    v = 2 * (math.cos(angle) * u + math.sin(angle) * v)
    zero = torch.zeros(30, dtype=torch.float64)
    a, b = (GaussianStats(zero, torch.outer(w, w), 2) for w in (u, v))
    expected = 1 + 4 - 2 * abs(float(u @ v))  # tr ((u u^T)(v v^T))^(1/2) = |u . v|
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@few
@given(seed=seeds)
def test_frechet_distance_from_itself_is_zero_and_never_below(seed: int) -> None:
    stats = GaussianStats.from_features(normal(20, 8, seed=seed))
    assert 0 <= quality.frechet_distance(stats, stats) < 1e-12


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    x = normal(12, 40)
    a = GaussianStats.from_features(x)
    assert quality.frechet_distance(a, a) <= 1e-12 * float(a.cov.trace())
    # Doubling about the mean doubles every deviation: the distance is tr cov
    b = GaussianStats.from_features(a.mean + 2 * (x - a.mean))
    assert quality.frechet_distance(a, b) == pytest.approx(float(a.cov.trace()), rel=1e-10)


def test_frechet_distance_of_constant_features_is_that_of_the_means() -> None:
    a, b = (GaussianStats.from_features(torch.full((5, 3), value)) for value in (0.0, 2.0))
    assert quality.frechet_distance(a, b) == 12


@few
@given(seed=seeds)
def test_frechet_distance_ignores_rotation_and_order(seed: int) -> None:
    x, y, q = normal(30, 6, seed=seed), normal(25, 6, seed=seed + 1) * 2, orthogonal(6, seed)
    a, b = GaussianStats.from_features(x), GaussianStats.from_features(y)
    distance = quality.frechet_distance(a, b)
    assert quality.frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    turned = (GaussianStats.from_features(z.flip(0) @ q - 7) for z in (x, y))
    assert quality.frechet_distance(*turned) == pytest.approx(distance, rel=1e-9)


def test_frechet_distance_refuses_what_is_no_pair_of_covariances() -> None:
    with pytest.raises(InputError, match="eigenvalue -1"):
        quality.frechet_distance(gaussian([0, 0], [[1, 0], [0, -1]]), gaussian([0, 0], [[1, 0], [0, 1]]))
    with pytest.raises(InputError, match="2 and 1 features"):
        quality.frechet_distance(gaussian([0, 0], [[1, 0], [0, 1]]), gaussian([0], [[1]]))


# --- inception score


def test_inception_score_has_its_known_values() -> None:
    certain = 1e4 * torch.eye(5).repeat(3, 1)
    assert quality.inception_score(certain) == pytest.approx(5, rel=1e-12)
    assert quality.inception_score(certain[[0, 0, 1, 1]]) == pytest.approx(2, rel=1e-12)
    assert quality.inception_score(normal(1, 5).repeat(4, 1)) == pytest.approx(1, rel=1e-12)


def test_inception_score_of_two_uncertain_samples() -> None:
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    m = [0.55, 0.45]
    kl = [
        0.9 * math.log(0.9 / m[0]) + 0.1 * math.log(0.1 / m[1]),
        0.2 * math.log(0.2 / m[0]) + 0.8 * math.log(0.8 / m[1]),
    ]
    assert quality.inception_score(p.log() + torch.tensor([[3.0], [-8.0]])) == pytest.approx(math.exp(sum(kl) / 2))


@pytest.mark.parametrize("logits", [torch.zeros(1, 5), torch.zeros(5), torch.full((3, 2), math.nan)])
def test_inception_score_refuses_malformed_logits(logits: Tensor) -> None:
    with pytest.raises(InputError, match="logits"):
        quality.inception_score(logits)


# --- precision and recall


def test_precision_and_recall_of_points_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # radii to the nearest other one: 1, 1, 1, 8
    fake = torch.tensor([[-1.0], [-1.5], [3.5], [30.0]])  # radii: 0.5, 0.5, 4.5, 26.5
    # In a real ball: -1 (on the rim of 0's) and 3.5 (in 10's). In a fake one: 0, 1, 2 (3.5's) and 10 (30's)
    assert quality.precision_recall(real, fake, k=1) == (0.5, 1.0)
    # With k=2 the real radii are 2, 1, 2, 9: -1.5 is inside as well
    assert quality.precision_recall(real, fake, k=2) == (0.75, 1.0)


def test_precision_and_recall_of_equal_and_distant_sets() -> None:
    x = normal(40, 6)
    assert quality.precision_recall(x, x) == (1.0, 1.0)
    assert quality.precision_recall(x, x + 100) == (0.0, 0.0)


def test_a_collapsed_sampler_is_precise_without_recall() -> None:
    real = normal(60, 4)
    fake = real[:1] + 1e-3 * normal(60, 4, seed=1)
    precision, recall = quality.precision_recall(real, fake)
    assert precision == 1.0
    assert recall < 0.1


def test_repeated_points_are_their_own_neighbours() -> None:
    """Balls of radius 0 hold exact copies and nothing else, however close."""
    real = normal(1, 64).repeat(5, 1)
    assert quality.precision_recall(real, real.clone()) == (1.0, 1.0)
    assert quality.precision_recall(real, real + 1e-9) == (0.0, 0.0)


@few
@given(seed=seeds)
def test_precision_is_the_recall_of_the_exchanged_sets(seed: int) -> None:
    x, y = normal(20, 3, seed=seed), normal(25, 3, seed=seed + 1) + 0.8
    precision, recall = quality.precision_recall(x, y)
    assert quality.precision_recall(y, x) == (recall, precision)
    assert quality.precision_recall(x.flip(0), y.roll(3, 0)) == (precision, recall)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(23, 3), normal(31, 3, seed=1) + 0.7
    whole = quality.precision_recall(x, y)
    monkeypatch.setattr(distances, "ROWS", 7)
    assert quality.precision_recall(x, y) == whole
    assert 0 < whole[0] < 1


def test_precision_and_recall_refuse_malformed_sets() -> None:
    x = normal(5, 3)
    with pytest.raises(InputError, match="k is 0"):
        quality.precision_recall(x, x, k=0)
    with pytest.raises(InputError, match="fake has 3 samples; it must have at least 4"):
        quality.precision_recall(x, x[:3])
    with pytest.raises(InputError, match="real has 3 features and fake 2"):
        quality.precision_recall(x, x[:, :2])
