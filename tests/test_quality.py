"""Quality measures against cases solved by hand, independent formulas, and what must not change them."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
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


# --- single samples


def test_contrast_of_a_checkerboard_and_of_flat_pictures() -> None:
    board = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    flat = torch.tensor([0.9, -0.9, 0.1])[:, None, None].expand(3, 2, 2)
    one_channel = torch.stack([board, torch.zeros(2, 2), torch.zeros(2, 2)])
    values = quality.contrast(torch.stack([board.expand(3, 2, 2), flat, one_channel]))
    torch.testing.assert_close(values, torch.tensor([1, 0, 1 / 3], dtype=torch.float64).sqrt(), rtol=0, atol=1e-7)


@few
@given(seed=seeds, scale=st.floats(-3, 3).filter(lambda s: abs(s) > 1e-3))
def test_contrast_scales_and_ignores_brightness_and_colour_basis(seed: int, scale: float) -> None:
    images = normal(3, 3, 5, 4, seed=seed)
    values = quality.contrast(images)
    changed = torch.einsum("dc,nchw->ndhw", orthogonal(3, seed), scale * images) + 0.5
    torch.testing.assert_close(quality.contrast(changed), abs(scale) * values, rtol=1e-10, atol=1e-12)


def test_contrast_sees_colour_fade_at_constant_luminance() -> None:
    red, green = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0])
    picture = torch.stack([red, green], dim=1)[None, :, None, :]  # (1, 3, 1, 2), the same sum in both pixels
    assert float(quality.contrast(0.5 * picture) / quality.contrast(picture)) == pytest.approx(0.5)


def test_recognised_counts_hits_overall_and_by_class() -> None:
    logits = torch.eye(4)[[0, 0, 1, 3, 3]]
    labels = torch.tensor([0, 1, 1, 3, 3], dtype=torch.int32)
    assert quality.recognised(logits, labels) == 0.8
    expected = torch.tensor([1.0, 0.5, math.nan, 1.0], dtype=torch.float64)
    torch.testing.assert_close(quality.recognised_by_class(logits, labels, 4), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tie_favours_no_class(dtype: torch.dtype) -> None:
    """A classifier that says the same of everything guesses; where two of four are largest, each is half right."""
    every = torch.arange(4)
    assert [quality.recognised(torch.full((9, 4), 7.0, dtype=dtype), label.expand(9)) for label in every] == [0.25] * 4
    two = torch.tensor([-1.0, 3.0, 2.0, 3.0], dtype=dtype)
    for order in (every, every.flip(0), every.roll(1)):
        by_class = quality.recognised_by_class(two[order].expand(4, 4), every, 4)
        assert by_class.tolist() == [0.5 if largest else 0.0 for largest in (two == 3.0)[order]]
    zeros = torch.tensor([[0.0, -0.0, -1.0]], dtype=dtype)
    assert quality.recognised(zeros, torch.tensor([0])) == quality.recognised(zeros, torch.tensor([1])) == 0.5


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="logits has 1 non-finite values"):
        quality.recognised(torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), r"must be \(3,\)"),
        (torch.tensor([0, 1, 4]), "label 4 is outside 0..3"),
        (torch.tensor([0, -1, 2]), "label -1 is outside"),
        (torch.tensor([0.0, 1.0, 2.0]), "integer dtype"),
        (torch.tensor([True, False, True]), "integer dtype"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quality.recognised(torch.zeros(3, 4), labels)
    with pytest.raises(InputError, match=message):
        quality.recognised_by_class(torch.zeros(3, 4), labels, 4)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(InputError, match="classes is 5; it must be 4"):
        quality.recognised_by_class(torch.zeros(3, 4), torch.tensor([0, 1, 2]), 5)


def test_paired_error_is_relative_for_each_sample() -> None:
    reference = normal(3, 3, 4, 4)
    factors = torch.tensor([1.0, 1.5, -1.0], dtype=torch.float64)
    errors = quality.paired_error(factors[:, None, None, None] * reference, reference)
    torch.testing.assert_close(errors, torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64))
    torch.testing.assert_close(
        quality.paired_error(reference + 0.1, reference)[0], 0.1 / reference[0].square().mean().sqrt()
    )


def test_paired_error_refuses_what_does_not_pair() -> None:
    images = normal(3, 3, 4, 4)
    with pytest.raises(InputError, match="must be equal"):
        quality.paired_error(images, images[:1])
    with pytest.raises(InputError, match="reference 1 has norm 0"):
        quality.paired_error(images, images * torch.tensor([1.0, 0.0, 1.0])[:, None, None, None])
    with pytest.raises(InputError, match="images has 48 non-finite"):
        quality.paired_error(images * torch.tensor([1.0, math.nan, 1.0])[:, None, None, None], images)


# --- spread over seeds


def test_mean_and_spread_of_known_values() -> None:
    assert quality.mean_and_spread([2, 4, 4, 4, 5, 5, 7, 9]) == quality.Spread(5.0, math.sqrt(32 / 7), 8)
    assert quality.mean_and_spread([1e9 + 1, 1e9 + 2, 1e9 + 3]).deviation == 1


def test_paired_difference_cancels_what_the_seeds_share() -> None:
    a, b = [11.0, 52.0, 93.0], [10.0, 50.0, 90.0]
    difference = quality.paired_difference(a, b)
    assert difference == quality.PairedDifference(2.0, 1 / math.sqrt(3), 3)
    assert difference.standard_error < quality.mean_and_spread(a).deviation / 10
    assert quality.paired_difference(b, a).mean == -2


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_a_spread_needs_two_finite_values(values: list[float]) -> None:
    with pytest.raises(InputError):
        quality.mean_and_spread(values)
    with pytest.raises(InputError):
        quality.paired_difference(values, [0.0] * len(values))


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(InputError, match="a has 2 values and b 3"):
        quality.paired_difference([1, 2], [1, 2, 3])


# --- features, reference, scores


def features(n: int = 24, seed: int = 0, shift: float = 0.0) -> quality.Features:
    return quality.Features(
        semantic=normal(n, 5, seed=seed).float() + shift,
        texture=normal(n, 3, seed=seed + 1).float(),
        logits=8 * torch.eye(4).repeat(n // 4, 1),
        contrast=torch.linspace(0.4, 0.6, n),
    )


@pytest.fixture
def reference() -> quality.Reference:
    return quality.Reference.from_features(features(), keep=10)


def test_features_refuse_unequal_counts_and_shapes() -> None:
    good = features()
    with pytest.raises(InputError, match="'texture': 23"):
        replace(good, texture=good.texture[1:])
    with pytest.raises(InputError, match="contrast has shape"):
        replace(good, contrast=good.contrast[:, None])
    with pytest.raises(InputError, match="semantic has 5 non-finite"):
        replace(good, semantic=torch.cat([good.semantic[1:], torch.full((1, 5), math.inf)]))


def test_reference_takes_the_statistics_of_all_and_keeps_some(reference: quality.Reference) -> None:
    whole = features()
    torch.testing.assert_close(reference.semantic.mean, whole.semantic.double().mean(dim=0))
    torch.testing.assert_close(reference.texture.cov, whole.texture.double().T.cov())
    assert reference.semantic.n == reference.texture.n == 24
    assert reference.contrast == pytest.approx(0.5)
    assert torch.equal(reference.real_semantic, whole.semantic[:10])


@pytest.mark.parametrize("keep", [3, 25])
def test_reference_refuses_to_keep_too_few_or_too_many(keep: int) -> None:
    with pytest.raises(InputError, match=rf"keep is {keep}; it must be in 4..24"):
        quality.Reference.from_features(features(), keep)


def test_reference_refuses_parts_that_disagree(reference: quality.Reference) -> None:
    with pytest.raises(InputError, match="real_semantic has 4 features"):
        replace(reference, real_semantic=reference.real_semantic[:, :4])
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="contrast is"):
            replace(reference, contrast=value)


def test_reference_survives_its_file(reference: quality.Reference, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    reference = replace(reference, contrast=1 / 3)
    reference.save(path)
    reference.save(str(path))  # over an existing file
    loaded = quality.Reference.load(path)
    for kind in ("semantic", "texture"):
        before, after = getattr(reference, kind), getattr(loaded, kind)
        assert torch.equal(before.mean, after.mean)
        assert torch.equal(before.cov, after.cov)
        assert before.n == after.n
    assert loaded.contrast == 1 / 3
    assert torch.equal(loaded.real_semantic, reference.real_semantic)
    assert list(tmp_path.iterdir()) == [path]


def test_reference_with_one_tensor_in_two_places_is_saved(tmp_path: Path) -> None:
    stats = GaussianStats.from_features(normal(9, 5))
    quality.Reference(stats, stats, 0.5, normal(5, 9).T).save(tmp_path / "r")
    assert torch.equal(quality.Reference.load(tmp_path / "r").real_semantic, normal(5, 9).T)


def metadata_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header["__metadata__"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": "other"}, "format 'other'"),
        ({"extra": torch.zeros(1)}, {}, r"lacks or adds \['extra'\]"),
        ({}, {"extra": "1"}, r"lacks or adds \['extra'\]"),
        ({"texture_cov": None}, {}, r"lacks or adds \['texture_cov'\]"),
        ({}, {"texture_n": None}, r"lacks or adds \['texture_n'\]"),
        ({}, {"texture_n": "1"}, "n is 1"),
        ({}, {"semantic_n": "many"}, "'many'"),
        ({}, {"contrast": "nan"}, "contrast is nan"),
        ({}, {"contrast": "high"}, "'high'"),
        ({"semantic_mean": torch.zeros(5)}, {}, "float64"),
        ({"semantic_mean": torch.zeros(4, dtype=torch.float64)}, {}, "square"),
        ({"real_semantic": torch.zeros(9, 4)}, {}, "4 features"),
        ({"real_semantic": torch.full((9, 5), math.nan)}, {}, "non-finite"),
        ({"real_semantic": torch.zeros(9, 5, dtype=torch.int32)}, {}, "floating dtype"),
    ],
)
def test_malformed_reference_files_are_refused(
    reference: quality.Reference,
    tmp_path: Path,
    tensors: dict[str, Tensor | None],
    metadata: dict[str, str | None],
    message: str,
) -> None:
    path = tmp_path / "reference.safetensors"
    reference.save(path)
    all_tensors = {**load_file(path), **tensors}
    all_metadata = {**metadata_of(path), **metadata}
    save_file(
        {name: tensor for name, tensor in all_tensors.items() if tensor is not None},
        path,
        {name: value for name, value in all_metadata.items() if value is not None},
    )
    with pytest.raises(InputError, match=message) as caught:
        quality.Reference.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_reference_files_are_refused(reference: quality.Reference, tmp_path: Path, length: int) -> None:
    path = tmp_path / "reference.safetensors"
    reference.save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="can't be read"):
        quality.Reference.load(path)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(InputError, match="format None"):
        quality.Reference.load(foreign)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="can't be read"):
            quality.Reference.load(path)


def test_a_file_that_cannot_be_written_leaves_nothing(reference: quality.Reference, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "none" / "x", tmp_path / "file" / "x", tmp_path / "folder", Path()):
        with pytest.raises(InputError, match="can't be written"):
            reference.save(target)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_the_reference_scores_perfectly_against_itself() -> None:
    own = features()
    scores = quality.score(own, torch.arange(24) % 4, quality.Reference.from_features(own, keep=24))
    assert scores.fd_semantic == pytest.approx(0, abs=1e-12)
    assert scores.fd_texture == pytest.approx(0, abs=1e-12)
    assert scores.inception_score == pytest.approx(quality.inception_score(own.logits))
    assert (scores.recognised, scores.precision, scores.recall, scores.n) == (1.0, 1.0, 1.0, 24)
    assert scores.contrast == pytest.approx(0.5)


def test_each_score_follows_its_own_features(reference: quality.Reference) -> None:
    real = features()
    shifted = replace(real, semantic=real.semantic + 50, contrast=real.contrast / 2)
    scores = quality.score(shifted, torch.zeros(24, dtype=torch.int64), reference)
    assert scores.fd_semantic == pytest.approx(5 * 50**2, rel=1e-5)
    assert scores.fd_texture == pytest.approx(0, abs=1e-12)
    assert (scores.recognised, scores.precision, scores.recall) == (0.25, 0.0, 0.0)
    assert scores.contrast == pytest.approx(0.25)
    blurred = quality.score(replace(real, texture=real.texture + 3), torch.arange(24) % 4, reference)
    assert blurred.fd_semantic == pytest.approx(0, abs=1e-12)
    assert blurred.fd_texture == pytest.approx(27, rel=1e-5)


def test_precision_and_recall_are_not_exchanged() -> None:
    real = features(60)
    collapsed = replace(real, semantic=real.semantic[:1] + 1e-3 * normal(60, 5, seed=7).float())
    scores = quality.score(collapsed, torch.arange(60) % 4, quality.Reference.from_features(real, keep=60))
    assert scores.precision == 1.0
    assert scores.recall < 0.1


def test_score_refuses_too_few_samples_and_other_extractors(reference: quality.Reference) -> None:
    real = features()
    with pytest.raises(InputError, match="at least 4"):
        quality.score(
            quality.Features(real.semantic[:3], real.texture[:3], real.logits[:3], real.contrast[:3]),
            torch.arange(3),
            reference,
        )
    with pytest.raises(InputError, match="2 and 3 features"):
        quality.score(replace(real, texture=real.texture[:, :2]), torch.arange(24) % 4, reference)


def test_any_callable_of_images_is_a_feature_extractor() -> None:
    def extract(images: Tensor) -> quality.Features:
        pooled = images.mean(dim=(2, 3))
        return quality.Features(pooled, images.amax(dim=(2, 3)), pooled, quality.contrast(images))

    extractor: quality.FeatureExtractor = extract
    assert extractor(normal(4, 3, 6, 6)).contrast.shape == (4,)


@pytest.mark.gpu
def test_features_on_a_gpu_score_alike(reference: quality.Reference) -> None:
    here = features(seed=4)
    there = quality.Features(here.semantic.cuda(), here.texture.cuda(), here.logits.cuda(), here.contrast.cuda())
    labels = torch.arange(24) % 4
    assert quality.score(there, labels.cuda(), reference) == quality.score(here, labels, reference)
