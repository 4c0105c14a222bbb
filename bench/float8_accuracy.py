"""How far float8 products take the bundled model from itself, beside what bfloat16 alone does: on a CPU.

    python -m bench.float8_accuracy [--samples 78] [--steps 50]

All against float32, uncached, DDPM at the default guidance. *Predictions*: at every step each way is given the very
latents of the float32 run, so that nothing adds up; the error is the guided noise's, relative, as a root mean square.
*Pictures*: each way runs by itself from the same noise; the error is the mean over samples of the final pictures'
relative RMS difference. Products are torch's reference, whose sums are exact beside those of a GPU's float8 cores. It
writes bench/results/float8-accuracy.json.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ebcache_fast import Engine, EngineOptions
from ebcache_fast.apps.bundled import labels_in_turn, load_letters
from ebcache_fast.apps.quality import paired_error, recognised
from ebcache_fast.apps.report import machine
from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Batch
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.trajectory import split
from ebcache_fast.plan import Plan
from ebcache_fast.samplers import trajectory_noise
from ebcache_fast.sampling import DEFAULT_CFG_SCALE, resolve_run

OUT = Path(__file__).resolve().parent / "results" / "float8-accuracy.json"
BATCH = 26
EXACT = "float32"


def engines() -> dict[str, Engine]:
    """Every way to run the bundled model, what all are held against first."""
    model = load_letters().model
    half, in_float8 = copy.deepcopy(model).bfloat16(), EngineOptions(fp8=True)
    return {
        EXACT: Engine(model),
        "float32, FP8 products": Engine(model, in_float8),
        "bfloat16": Engine(half),
        "bfloat16, FP8 products": Engine(half, in_float8),
    }


def run(engine: Engine, plan: Plan, labels: Tensor, noise: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """The latents (N, C, H, W) before each step, and after the last."""
    with engine.sampling(plan, labels, Guidance(DEFAULT_CFG_SCALE), rows, noise) as running:
        yield running.x.clone()
        while running.advance():
            yield running.x.clone()


def predictions(engine: Engine, plan: Plan, labels: Tensor, latents: list[Tensor]) -> list[Tensor]:
    """The guided noise (N, C, H, W) that each step predicts for the latents of it."""
    guidance, channels = Guidance(DEFAULT_CFG_SCALE), latents[0].shape[1]
    row_labels = guidance.row_labels(engine.denoiser, labels)
    batch = Batch(row_labels, len(labels), guidance.channels, engine.denoiser.latent_shape)
    running = engine.forward_run(plan, batch, Tail())
    running.guide(DEFAULT_CFG_SCALE)
    found = [split(running.predict(i, x), len(labels), channels).eps for i, x in enumerate(latents)]
    engine.release(running.buffer_set)
    return found


def measure(samples: int, steps: int) -> list[dict[str, object]]:
    """What is told of each way but the exact one."""
    ways, preset = engines(), load_letters()
    denoiser = ways[EXACT].denoiser
    plan, stepper = resolve_run(denoiser, None, steps, "ddpm", None)
    rows, labels = torch.tensor(stepper.rows), torch.tensor(labels_in_turn(samples, denoiser.num_classes))
    pictures: Mapping[str, list[Tensor]] = {name: [] for name in ways}
    squares = {name: torch.zeros(steps, dtype=torch.float64) for name in ways}  # of errors; of what is exact, itself
    for start in range(0, samples, BATCH):
        part = labels[start : start + BATCH]
        noise = trajectory_noise(0, range(start, start + len(part)), steps, denoiser.latent_shape)
        runs = {name: list(run(engine, plan, part, noise, rows)) for name, engine in ways.items()}
        exact = predictions(ways[EXACT], plan, part, runs[EXACT][:-1])
        for name, engine in ways.items():
            pictures[name].append(runs[name][-1])
            found = exact if name == EXACT else predictions(engine, plan, part, runs[EXACT][:-1])
            wrong = found if name == EXACT else [a - b for a, b in zip(found, exact, strict=True)]
            squares[name] += torch.stack([each.double().square().sum() for each in wrong])
    whole = {name: torch.cat(parts) for name, parts in pictures.items()}
    told = []
    for name, engine in ways.items():
        errors = [] if name == EXACT else (squares[name] / squares[EXACT]).sqrt().tolist()
        apart = paired_error(whole[name], whole[EXACT])
        told.append(
            {
                "name": name,
                "products": engine.stats.operations["scaled_linear"],
                "eps_error": errors,  # by step, in execution order
                "eps_error_median": statistics.median(errors) if errors else 0.0,
                "picture_error": float(apart.mean()),
                "picture_error_stderr": float(apart.std() / len(apart) ** 0.5),
                "recognised": recognised(preset.judge(whole[name]).logits, labels),
            }
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3 * BATCH)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    ways = measure(args.samples, args.steps)
    for way in ways:
        print(
            f"{way['name']}: eps {way['eps_error_median']:.2e} in the median step, pictures "
            f"{way['picture_error']:.3f}, recognised {way['recognised']:.3f}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"samples": args.samples, "steps": args.steps, "ways": ways, "machine": machine()}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
