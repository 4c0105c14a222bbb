"""Scores with what stands behind them: their standard errors, and each sample's own figures."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ebcache_fast.apps.quality.samples import recognition
from ebcache_fast.apps.quality.scoring import FeatureExtractor, Features, Reference, Scores, score
from ebcache_fast.apps.quality.spread import jackknife_error

WITH_ERRORS = ("fd_semantic", "fd_texture", "recognised", "contrast", "precision", "recall")


@dataclass(frozen=True)
class Judgement:
    """Scores, the standard error of each by name, and by name a figure of each sample."""

    scores: Scores
    errors: dict[str, float]
    per_sample: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Judge:
    """Judge of samples: an extractor of their features, and the real data that these are held against."""

    extract: FeatureExtractor
    reference: Reference

    def __call__(self, images: Tensor, labels: Tensor, groups: int = 8) -> Judgement:
        """Score pictures (N, C, H, W) with labels (N,); errors by leaving out one of ``groups`` groups at a time.

        Raises InputError as `score` does.
        """
        features = self.extract(images)
        group = torch.arange(len(labels)) % groups
        left_out = [score(_select(features, group != g), labels[group != g], self.reference) for g in range(groups)]
        return Judgement(
            scores=score(features, labels, self.reference),
            errors={name: jackknife_error([getattr(scores, name) for scores in left_out]) for name in WITH_ERRORS},
            per_sample={
                "recognised": tuple(recognition(features.logits, labels).tolist()),
                "contrast": tuple(features.contrast.tolist()),
            },
        )


def _select(features: Features, rows: Tensor) -> Features:
    return Features(
        semantic=features.semantic[rows],
        texture=features.texture[rows],
        logits=features.logits[rows],
        contrast=features.contrast[rows],
    )
