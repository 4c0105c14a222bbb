"""Turn finished training runs into the files that the package ships.

    python -m bench.default_model.build_assets --model runs/default --classifier runs/classifier

It writes ebcache_fast/assets/letters/: model.safetensors (float16), classifier.safetensors, reference.safetensors
(statistics of fresh real pictures) and real.safetensors (some of those pictures).
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.default_model.fonts import LETTERS
from bench.default_model.letters import GlyphBank
from bench.default_model.train import MODEL
from ebcache_fast.apps.bundled import LetterJudge
from ebcache_fast.apps.pictures import to_pixels
from ebcache_fast.apps.quality import Reference
from ebcache_fast.apps.quality.letter_classifier import LetterClassifier
from ebcache_fast.models.checkpoint import save_weights
from ebcache_fast.models.modules import DiT

ASSETS = Path(__file__).resolve().parents[2] / "ebcache_fast" / "assets" / "letters"
REFERENCE_IMAGES, KEPT_FEATURES, KEPT_IMAGES = 26 * 400, 26 * 40, 26 * 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of train.py")
    parser.add_argument("--classifier", type=Path, required=True, help="folder of train_classifier.py")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    ASSETS.mkdir(parents=True, exist_ok=True)

    model = DiT(**MODEL)
    model.load_state_dict(torch.load(args.model / "checkpoint.pt", weights_only=True, map_location="cpu")["ema"])
    save_weights(model, ASSETS / "model.safetensors", dtype=torch.float16)

    shutil.copyfile(args.classifier / "classifier.safetensors", ASSETS / "classifier.safetensors")
    classifier = LetterClassifier()
    classifier.load_state_dict(load_file(ASSETS / "classifier.safetensors"))
    bank = GlyphBank(torch.load(args.model / "bank.pt", weights_only=True))
    generator = torch.Generator().manual_seed(args.seed)
    labels = torch.arange(REFERENCE_IMAGES) % len(LETTERS)
    images = torch.cat([bank.draw(part, generator) for part in labels.split(26 * 40)])
    judge = LetterJudge(classifier.eval())
    Reference.from_features(judge(images), keep=KEPT_FEATURES).save(ASSETS / "reference.safetensors")
    pixels = to_pixels(images[:KEPT_IMAGES]).permute(0, 3, 1, 2).contiguous()  # (N, 3, 24, 24) uint8
    save_file({"images": pixels}, ASSETS / "real.safetensors")


if __name__ == "__main__":
    main()
