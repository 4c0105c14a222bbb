"""Quality of samples: distances to real data, diversity, contrast, recognition, error against uncached.

No single number is trusted: a Frechet distance on semantic features hardly notices that colour collapses, so
a second one on texture features, the contrast, and the error against the uncached sample of the same noise
stand beside it. All is computed in float64 on the CPU, whatever device and floating dtype the inputs have.
"""

from ebcache_fast.apps.quality.distances import GaussianStats, frechet_distance, inception_score, precision_recall
from ebcache_fast.apps.quality.judging import Judge, Judgement
from ebcache_fast.apps.quality.samples import contrast, paired_error, recognised, recognised_by_class, recognition
from ebcache_fast.apps.quality.scoring import FeatureExtractor, Features, Reference, Scores, score
from ebcache_fast.apps.quality.spread import (
    PairedDifference,
    Spread,
    jackknife_error,
    mean_and_spread,
    paired_difference,
)

__all__ = [
    "FeatureExtractor",
    "Features",
    "GaussianStats",
    "Judge",
    "Judgement",
    "PairedDifference",
    "Reference",
    "Scores",
    "Spread",
    "contrast",
    "frechet_distance",
    "inception_score",
    "jackknife_error",
    "mean_and_spread",
    "paired_difference",
    "paired_error",
    "precision_recall",
    "recognised",
    "recognised_by_class",
    "recognition",
    "score",
]
