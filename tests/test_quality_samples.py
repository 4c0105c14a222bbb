"""Measures of single samples, and of their spread over seeds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebcache_fast.apps import quality
from ebcache_fast.errors import InputError

few = settings(max_examples=25)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal(size: int, seed: int = 0) -> Tensor:
    q: Tensor = torch.linalg.qr(normal(size, size, seed=seed)).Q
    return q


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
