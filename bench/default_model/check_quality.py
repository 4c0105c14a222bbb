"""Whether the bundled model is good enough to compare methods on, judged on samples of every letter.

    python -m bench.default_model.check_quality

The bars: at least 97% of 2,002 samples recognised at 50 steps and the default guidance, no letter under 90%; mean
contrast within 5% of the real data's; recall at least 0.8 of that between two halves of real data, at equal counts.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebcache_fast import sample
from ebcache_fast.apps.bundled import LETTERS, labels_in_turn, load_letters
from ebcache_fast.apps.quality import precision_recall, recognised, recognised_by_class, score
from ebcache_fast.apps.report import machine

SAMPLES = 26 * 77
OUT = Path(__file__).resolve().parents[1] / "results" / "letters-quality.json"


def make(start: int, count: int) -> Tensor:
    """Samples ``start`` to ``start + count`` of seed 0, on one thread."""
    torch.set_num_threads(1)
    labels = labels_in_turn(start + count, 26)[start:]
    return sample(load_letters().model, labels, first_index=start, batch_size=52)


def judge(images: Tensor) -> dict[str, Any]:
    """The scores and the bars they are held against."""
    preset = load_letters()
    labels = torch.tensor(labels_in_turn(len(images), 26))
    features = preset.judge(images)
    by_letter = recognised_by_class(features.logits, labels, 26)
    scores = score(features, labels, preset.reference)
    real = preset.reference.real_semantic
    half = len(real) // 2
    _, real_recall = precision_recall(real[:half], real[half:])
    parts = torch.split(features.semantic, half)[: len(images) // half]
    recalls = [precision_recall(real[:half], part)[1] for part in parts]
    recall = sum(recalls) / len(recalls)
    contrast_ratio = scores.contrast / preset.reference.contrast
    share = recognised(features.logits, labels)
    return {
        "samples": len(images),
        "recognised": share,
        "recognised_by_letter": dict(zip(LETTERS, by_letter.tolist(), strict=True)),
        "contrast_ratio": contrast_ratio,
        "recall": recall,
        "recall_between_real_halves": real_recall,
        "fd_semantic": scores.fd_semantic,
        "fd_texture": scores.fd_texture,
        "inception_score": scores.inception_score,
        "bars": {
            "recognised >= 0.97": share >= 0.97,
            "every letter >= 0.90": float(by_letter.min()) >= 0.90,
            "contrast within 5%": abs(contrast_ratio - 1) <= 0.05,
            "recall >= 0.8 of real": recall >= 0.8 * real_recall,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    starts = range(0, args.samples, 26 * 7)
    with ProcessPoolExecutor(2) as pool:
        images = torch.cat(list(pool.map(make, starts, (min(26 * 7, args.samples - start) for start in starts))))
    report = judge(images) | {"machine": machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
