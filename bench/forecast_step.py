"""A forecast step beside a step that reuses every branch: time on this machine, bytes of cache, launches.

    python -m bench.forecast_step

Models of depth 28 and 256 tokens, their weights random, one guided sample. Steps take turns in one process, as the
drop-in runs them; figures are medians of the rounds' ratios, with quartiles.
It writes bench/results/forecast-step.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ebcache_fast.apps.report import machine
from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.guidance import GUIDED_CHANNELS
from ebcache_fast.models import DiT, as_denoiser
from ebcache_fast.plan import ModelShape, Plan, StepType, lower
from ebcache_fast.policies import forecast

OUT = Path(__file__).resolve().parent / "results" / "forecast-step.json"
WIDTHS = {"DiT-S": (384, 6), "DiT-B": (768, 12), "DiT-XL": (1152, 16)}
DEPTH, TIMESTEPS = 28, (900, 700, 500, 300)
ORDERS = (0, 1, 2)


def model_of(width: int, heads: int, device: torch.device, dtype: torch.dtype) -> DiT:
    """A DiT of depth 28 with random weights."""
    torch.manual_seed(0)
    model = DiT(input_size=32, patch_size=2, in_channels=4, hidden_size=width, depth=DEPTH, num_heads=heads)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device, dtype).eval()


def plans_of(shape: ModelShape) -> dict[str, Plan]:
    """Plans of which the last step is the one that is timed, by name."""
    types = [StepType.NO_CACHE, *[StepType.ATTN_MLP] * (len(TIMESTEPS) - 1)]
    reusing = {"ATTN_MLP": Plan.from_types(types, TIMESTEPS, shape.sites)}
    return reusing | {
        f"forecast of the stack, order {order}": forecast(TIMESTEPS, shape, range(order + 1), order) for order in ORDERS
    }


@torch.no_grad()
def measure(model: DiT, rounds: int) -> dict[str, Any]:
    """Ratios of each plan's last step to that of ATTN_MLP, and what its cache takes."""
    denoiser, engine = as_denoiser(model), Engine(model)
    shape, weight = denoiser.shape, denoiser.weight()
    labels = torch.tensor([1, denoiser.num_classes], device=weight.device)
    batch = Batch(labels, 1, GUIDED_CHANNELS, tuple(denoiser.latent_shape))
    x = torch.randn(1, *denoiser.latent_shape, device=weight.device, dtype=torch.float32)
    plans, last = plans_of(shape), len(TIMESTEPS) - 1
    runs = {name: engine.forward_run(plan, batch, Tail()) for name, plan in plans.items()}
    for run in runs.values():
        for step in range(len(TIMESTEPS)):
            run.predict(step, x)
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(5):
                run.predict(last, x)
            if weight.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - began) / 5)
    found = {}
    for name, plan in plans.items():
        ratios = [own / base for own, base in zip(seconds[name], seconds["ATTN_MLP"], strict=True)]
        bytes_of = {other: plans[other].cache_bytes(shape, 2, weight.element_size()) for other in (name, "ATTN_MLP")}
        quartiles = statistics.quantiles(ratios, n=4)
        found[name] = {
            "milliseconds": 1000 * statistics.median(seconds[name]),
            "ratio": quartiles[1],
            "ratio_quartiles": [quartiles[0], quartiles[2]],
            "cache_bytes": bytes_of[name],
            "cache_ratio": bytes_of[name] / bytes_of["ATTN_MLP"],
            "launches": {
                form: len(lower(plan.steps[last], shape.site_shapes, plan.memory, samples=form == "own loop"))
                for form in ("own loop", "drop-in")
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report: dict[str, Any] = {"rounds": args.rounds, "depth": DEPTH, "machine": machine(), "models": {}}
    for name, (width, heads) in WIDTHS.items():
        report["models"][name] = found = measure(model_of(width, heads, device, dtype), args.rounds)
        for step, figures in found.items():
            low, high = figures["ratio_quartiles"]
            print(
                f"{name}: {step}: {figures['milliseconds']:.2f} ms, {figures['ratio']:.3f} [{low:.3f}, {high:.3f}] of "
                f"ATTN_MLP's time, {figures['cache_ratio']:.3f} of its cache, launches {figures['launches']}",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
