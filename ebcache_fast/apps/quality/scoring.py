"""The features of some pictures, the statistics of the real ones, and the scores of one against the other."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, contiguous_format

from ebcache_fast.apps.quality.checks import checked
from ebcache_fast.apps.quality.distances import GaussianStats, frechet_distance, inception_score, precision_recall
from ebcache_fast.apps.quality.samples import recognised
from ebcache_fast.errors import InputError
from ebcache_fast.plan.files import replacing

FORMAT = "ebcache_fast.reference/1"
TENSORS = frozenset({"semantic_mean", "semantic_cov", "texture_mean", "texture_cov", "real_semantic"})
NEIGHBOURS = 3  # of precision and recall
METADATA = frozenset({"format", "semantic_n", "texture_n", "contrast"})


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N pictures, as a classifier sees them, in any floating dtype, on any device.

    semantic (N, F1): its last layer before the logits. texture (N, F2): pooled statistics of an early layer.
    logits (N, K). contrast (N,): `contrast(images)`.
    Raises InputError unless all are finite and have as many samples.
    """

    semantic: Tensor
    texture: Tensor
    logits: Tensor
    contrast: Tensor

    def __post_init__(self) -> None:
        parts = {"semantic": self.semantic, "texture": self.texture, "logits": self.logits}
        counts = {name: checked(part, name, 2).shape[0] for name, part in parts.items()}
        counts["contrast"] = checked(self.contrast, "contrast", 1).shape[0]
        if len(set(counts.values())) != 1:
            raise InputError(f"the features have {counts} samples; these must be equal: extract all from one batch")


class FeatureExtractor(Protocol):
    """Extractor of features: maps pictures (N, C, H, W) to their Features."""

    def __call__(self, images: Tensor, /) -> Features: ...


@dataclass(frozen=True, eq=False)
class Reference:
    """The real data: statistics of both kinds of features, mean contrast, and features (M, F1) of M >= 4.

    Raises InputError unless the contrast is above 0 and real_semantic is finite and fits the statistics.
    """

    semantic: GaussianStats
    texture: GaussianStats
    contrast: float
    real_semantic: Tensor

    def __post_init__(self) -> None:
        real = checked(self.real_semantic, "real_semantic", 2, least=NEIGHBOURS + 1)
        if real.shape[1] != self.semantic.mean.shape[0]:
            raise InputError(
                f"real_semantic has {real.shape[1]} features, the statistics {self.semantic.mean.shape[0]}; "
                "they must have as many: use one feature extractor for both"
            )
        if not (math.isfinite(self.contrast) and self.contrast > 0):
            raise InputError(f"contrast is {self.contrast}; it must be finite and above 0: measure it on real pictures")

    @classmethod
    def from_features(cls, features: Features, keep: int) -> Self:
        """Statistics of all N >= 4 real pictures, and the semantic features of the first `keep`, in float32.

        Raises InputError if `keep` is not in 4..N.
        """
        n = features.semantic.shape[0]
        if not NEIGHBOURS < keep <= n:
            raise InputError(f"keep is {keep}; it must be in {NEIGHBOURS + 1}..{n}, the number of samples: change it")
        return cls(
            semantic=GaussianStats.from_features(features.semantic),
            texture=GaussianStats.from_features(features.texture),
            contrast=float(checked(features.contrast, "contrast", 1).mean()),
            real_semantic=features.semantic[:keep].detach().float().cpu().clone(),
        )

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, whole or not at all; InputError if it can't be written."""
        tensors = {
            "semantic_mean": self.semantic.mean,
            "semantic_cov": self.semantic.cov,
            "texture_mean": self.texture.mean,
            "texture_cov": self.texture.cov,
            "real_semantic": self.real_semantic,
        }
        metadata = {
            "format": FORMAT,
            "semantic_n": str(self.semantic.n),
            "texture_n": str(self.texture.n),
            "contrast": repr(self.contrast),
        }
        # Copies, because safetensors refuses tensors that share memory
        data = to_safetensors(
            {name: tensor.clone(memory_format=contiguous_format) for name, tensor in tensors.items()},
            metadata,
        )
        with replacing(Path(path), InputError) as partial:
            partial.write_bytes(data)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote; InputError if the file is missing, foreign, truncated or inconsistent."""
        tensors, metadata = _read(Path(path))
        try:
            return cls(
                semantic=GaussianStats(tensors["semantic_mean"], tensors["semantic_cov"], int(metadata["semantic_n"])),
                texture=GaussianStats(tensors["texture_mean"], tensors["texture_cov"], int(metadata["texture_n"])),
                contrast=float(metadata["contrast"]),
                real_semantic=tensors["real_semantic"],
            )
        except ValueError as error:  # of int, float and, as InputError, of the checks
            raise InputError(
                f"{path} is no valid reference file ({error}); write it anew with Reference.save"
            ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file with the format and names that `Reference.save` writes."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read as safetensors ({error}); pass a file of Reference.save") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} has the format {metadata.get('format')!r}; it must be {FORMAT!r}: use Reference.save")
    odd = sorted((tensors.keys() ^ TENSORS) | (metadata.keys() ^ METADATA))
    if odd:
        raise InputError(f"{path} lacks or adds {odd}; it must hold what Reference.save writes: write it anew")
    return tensors, metadata


@dataclass(frozen=True)
class Scores:
    """Scores of n samples against the real data; hold their mean contrast against `Reference.contrast`."""

    fd_semantic: float
    fd_texture: float
    inception_score: float
    recognised: float
    contrast: float
    precision: float
    recall: float
    n: int


def score(features: Features, labels: Tensor, reference: Reference) -> Scores:
    """Score N >= 4 samples with these labels (N,), integer, against the real data.

    Raises InputError for too few samples, labels that do not fit, or features from another extractor.
    """
    precision, recall = precision_recall(reference.real_semantic, features.semantic, NEIGHBOURS)
    return Scores(
        fd_semantic=frechet_distance(GaussianStats.from_features(features.semantic), reference.semantic),
        fd_texture=frechet_distance(GaussianStats.from_features(features.texture), reference.texture),
        inception_score=inception_score(features.logits),
        recognised=recognised(features.logits, labels),
        contrast=float(checked(features.contrast, "contrast", 1).mean()),
        precision=precision,
        recall=recall,
        n=features.semantic.shape[0],
    )
