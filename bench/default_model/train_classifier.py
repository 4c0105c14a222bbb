"""Train the letter classifier on the training faces and test it on the held-out ones.

    python -m bench.default_model.train_classifier --out runs/classifier

It writes classifier.safetensors (float16) and classifier.json (accuracy on faces it never saw) into ``--out``.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from bench.default_model.fonts import LETTERS, find_faces, split_faces
from bench.default_model.letters import WIDE, GlyphBank, render_bank
from ebcache_fast.apps.quality import recognised, recognised_by_class
from ebcache_fast.apps.quality.letter_classifier import LetterClassifier


def accuracy(model: LetterClassifier, bank: GlyphBank, images: int, seed: int) -> tuple[float, list[float]]:
    """(overall, by letter) share of freshly drawn images that are recognised."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % len(LETTERS)
    with torch.no_grad():
        logits = torch.cat([model(bank.draw(part, generator)).logits for part in labels.split(260)])
    return recognised(logits, labels), recognised_by_class(logits, labels, len(LETTERS)).tolist()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    training, held_out = (
        render_bank([face.path for face in faces], WIDE, seed=seed)
        for seed, faces in enumerate(split_faces(find_faces()), start=1)
    )
    model = LetterClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-3)
    steps = args.images // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(args.seed)
    started = time.time()
    for step in range(steps):
        labels = torch.randint(len(LETTERS), (args.batch,), generator=generator)
        images = training.draw(labels, generator)
        noise = torch.rand(len(images), 1, 1, 1, generator=generator) * 0.15  # so that faint noise fools it less
        loss = F.cross_entropy(model(images + noise * torch.randn_like(images)).logits, labels, label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            seen = (step + 1) * args.batch
            print(f"{seen} images, {seen / (time.time() - started):.0f}/s, loss {loss.item():.4f}", flush=True)
    save_file(
        {name: p.half().contiguous() for name, p in model.state_dict().items()},
        args.out / "classifier.safetensors",
    )
    overall, by_letter = accuracy(model, held_out, 26 * 400, seed=1000)
    report = {
        "held_out_faces": held_out.masks.shape[0],
        "training_faces": training.masks.shape[0],
        "images": args.images,
        "held_out_accuracy": overall,
        "held_out_accuracy_by_letter": dict(zip(LETTERS, by_letter, strict=True)),
        "training_accuracy": accuracy(model, training, 26 * 400, seed=1001)[0],
    }
    (args.out / "classifier.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
