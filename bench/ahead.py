"""The default calibration against rivals at equal cost, on noise that nothing was fitted on.

    python -m bench.ahead --settings ddim-20 ddpm-50

Each setting is calibrated once on 128 samples of seed 0. Then all methods take turns on the same noise of three other
seeds, 520 samples each, batch by batch; FORA, TaylorSeer's fixed interval and fewer steps compute as many steps as the
path does. What is finished is kept in --raw, so that the same command goes on. It writes bench/results/ahead.json.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ebcache_fast.apps.bundled import labels_in_turn, letters_judge, load_letters
from ebcache_fast.apps.compare import Method, judge_runs, run_methods
from ebcache_fast.apps.report import machine
from ebcache_fast.calibration.algorithm1 import Algorithm1
from ebcache_fast.calibration.search import calibrate
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import ModelShape, Plan, StepType
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.policies import fora, forecast
from ebcache_fast.samplers import make_sampler

OUT = Path(__file__).resolve().parent / "results" / "ahead.json"
RAW = Path(__file__).resolve().parents[1] / "experimental" / "ahead"
SEEDS, SAMPLES, BATCH = (101, 102, 103), 520, 52
BUDGETS = {
    "ddim-10": (1.41, 2.4),
    "ddim-20": (1.64, 2.4),
    "ddim-50": (1.5, 2.5),
    "ddpm-20": (1.5, 2.4),
    "ddpm-50": (1.45, 2.5),
}


@dataclass(frozen=True)
class Row:
    """Figures of one method at one budget, over the seeds; spreads are the least and the most of a seed."""

    setting: str
    budget: float
    method: str
    computed: int
    mac_limit: float
    paired_error: float
    paired_error_spread: tuple[float, float]
    semantic: float
    semantic_spread: tuple[float, float]
    texture: float
    texture_spread: tuple[float, float]
    recognised: float


def spread_out(steps: int, computed: int) -> list[int]:
    """So many indices, the first 0, at a fixed interval that may be a fraction."""
    return [math.floor(i * steps / computed) for i in range(computed)]


def fora_of(timesteps: tuple[int, ...], computed: int, shape: ModelShape) -> Plan:
    """FORA's plan of so many full steps."""
    last = len(timesteps) - 1
    plans = (fora(timesteps, last / full, shape) for full in range(1, last + 1))
    return next(plan for plan in plans if plan.counts()[StepType.NO_CACHE] == computed)


def methods_of(sampler: str, steps: int, budget: float, shape: ModelShape, model: Any, raw: Path) -> dict[str, Method]:
    """All methods of one budget, by name."""
    timesteps = make_sampler(sampler, steps).timesteps
    path = tables(raw, "path", model, sampler, steps, budget)
    voted = tables(raw, "algorithm1", model, sampler, steps, budget)
    computed = sum(bool(step.computed) for step in path.plan(shape).steps)
    found = {
        "path": path.plan(shape),
        "Algorithm 1": voted.plan(shape),
        "FORA": fora_of(timesteps, computed, shape),
        **{
            f"TaylorSeer, order {order}": forecast(
                timesteps, shape, spread_out(steps, computed), order, "taylor", of="branches"
            )
            for order in (1, 2)
        },
    }
    named = {name: Method(name, plan, sampler) for name, plan in found.items()}
    if sampler == "ddim":
        for name, fewer in (("fewer steps", "ddim"), ("DPM-Solver++", "dpm-solver++")):
            plan = Plan.uncached(make_sampler(fewer, computed).timesteps, shape.sites)
            named[name] = Method(name, plan, fewer)
    return named


def tables(raw: Path, method: str, model: Any, sampler: str, steps: int, budget: float) -> CacheTable:
    """The table of one calibration, made once."""
    raw.mkdir(parents=True, exist_ok=True)
    file = raw / f"{method}-{sampler}-{steps}-{budget}.json"
    if not file.exists():
        more: dict[str, Any] = {} if method == "path" else {"samples": 208, "algorithm": Algorithm1()}
        calibrate(
            model,
            method=method,
            sampler=sampler,
            steps=steps,
            target_speedup=budget,
            progress_file=raw / f"{method}-{sampler}-{steps}.progress" if method == "path" else None,
            **more,
        ).save(file)
    return CacheTable.load(file)


def seed_of(setting: str, seed: int, model: Any, raw: Path) -> dict[str, dict[str, Any]]:
    """What each method of a setting did on one seed's noise; read where it is known."""
    file = raw / f"{setting}-{seed}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    sampler, _, count = setting.partition("-")
    steps, shape = int(count), as_denoiser(model).shape
    methods = {
        "uncached": Method("uncached", Plan.uncached(make_sampler(sampler, steps).timesteps, shape.sites), sampler)
    }
    for budget in BUDGETS[setting]:
        of_budget = methods_of(sampler, steps, budget, shape, model, raw)
        methods |= {f"{budget}: {name}": method for name, method in of_budget.items()}
    labels = torch.tensor(labels_in_turn(SAMPLES, 26))
    runs = run_methods(model, list(methods.values()), labels, seed=seed, batch_size=BATCH)
    results = judge_runs(model, list(methods.values()), runs, labels, letters_judge())
    found = {
        name: {
            "computed": sum(bool(step.computed) for step in method.plan.steps),
            "mac_limit": result.mac_limit,
            "paired_errors": list(result.per_sample["paired_error"]),
            **asdict(result.scores),  # type: ignore[arg-type]
        }
        for (name, method), result in zip(methods.items(), results, strict=True)
    }
    file.write_text(json.dumps(found))
    return found


def rows_of(setting: str, seeds: Sequence[dict[str, dict[str, Any]]]) -> Iterable[Row]:
    """A row for each method and budget."""
    for key in seeds[0]:
        budget, _, name = key.rpartition(": ")
        figures = [seed[key] for seed in seeds]
        errors = [statistics.mean(figure["paired_errors"]) for figure in figures]
        semantic, texture = ([float(figure[which]) for figure in figures] for which in ("fd_semantic", "fd_texture"))
        yield Row(
            setting,
            float(budget or 1),
            name,
            figures[0]["computed"],
            figures[0]["mac_limit"],
            statistics.mean(errors),
            (min(errors), max(errors)),
            statistics.mean(semantic),
            (min(semantic), max(semantic)),
            statistics.mean(texture),
            (min(texture), max(texture)),
            statistics.mean(float(figure["recognised"]) for figure in figures),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--raw", type=Path, default=RAW)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_letters().model
    rows: list[Row] = []
    for setting in args.settings:
        found = [seed_of(setting, seed, model, args.raw) for seed in SEEDS]
        rows += rows_of(setting, found)
        for row in rows_of(setting, found):
            low, high = row.paired_error_spread
            print(
                f"{row.setting} {row.budget}x {row.method:22s} {row.computed:3d} computed, {row.mac_limit:.2f}x: "
                f"paired {row.paired_error:.4f} [{low:.4f}, {high:.4f}], semantic {row.semantic:.3f}, "
                f"texture {row.texture:.4f}, recognised {row.recognised:.3f}",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"seeds": SEEDS, "samples": SAMPLES, "machine": machine(), "rows": [asdict(row) for row in rows]}
    args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
