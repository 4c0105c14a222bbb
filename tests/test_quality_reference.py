"""Features, a reference and its file, and the scores against it."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ebcache_fast.apps import quality
from ebcache_fast.apps.quality import GaussianStats
from ebcache_fast.errors import InputError


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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
