"""Does a path's table hold elsewhere than where it was found: on other noise, at other guidance, under other samplers?

    python -m bench.transfer

Each table is found on 52 samples of one seed at guidance 1.5. It is run on another seed, at guidance 1 to 4, and moved
to the other sampler and to other numbers of steps, beside FORA of as many computed steps and, at guidance 1 and 4, a
table found there. What is finished is kept in --raw. It writes bench/results/transfer.json.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.ahead import fora_of
from ebcache_fast.apps.bundled import labels_in_turn, load_letters
from ebcache_fast.apps.compare import Method, run_methods
from ebcache_fast.apps.quality.samples import paired_error
from ebcache_fast.apps.report import machine
from ebcache_fast.calibration.search import calibrate
from ebcache_fast.errors import TableError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.samplers import make_sampler

OUT = Path(__file__).resolve().parent / "results" / "transfer.json"
RAW = Path(__file__).resolve().parents[1] / "experimental" / "transfer"
FOUND_ON, SCALE = 52, 1.5
HOMES = (("ddim", 20, 2.4), ("ddpm", 50, 2.5))
SCALES, FOUND_AT = (1.0, 1.5, 2.0, 3.0, 4.0), (1.0, 4.0)  # of guidance; where a table is found beside the one moved
SEEDS, SAMPLES, BATCH = (101,), 104, 52


@dataclass(frozen=True)
class Row:
    """Paired errors of one table at one place, means over all seeds and samples."""

    table: str
    sampler: str
    steps: int
    scale: float
    computed: int
    path: float
    fora: float
    found_here: float | None  # the error of a table found at this very place


def table_of(model: Any, raw: Path, sampler: str, steps: int, target: float, scale: float) -> CacheTable:
    """The table found at a place, made once."""
    raw.mkdir(parents=True, exist_ok=True)
    file = raw / f"{sampler}-{steps}-{target}-{scale}.json"
    if not file.exists():
        progress = raw / f"{sampler}-{steps}-{scale}.progress"
        calibrate(
            model,
            samples=FOUND_ON,
            sampler=sampler,
            steps=steps,
            target_speedup=target,
            cfg_scale=scale,
            progress_file=progress,
        ).save(file)
    return CacheTable.load(file)


def errors_of(model: Any, plans: Mapping[str, Plan], sampler: str, scale: float) -> dict[str, float]:
    """Mean paired error of each plan against the uncached run of its sampler and steps."""
    timesteps, sites = next(iter(plans.values())).timesteps, as_denoiser(model).shape.sites
    methods = [Method("uncached", Plan.uncached(timesteps, sites), sampler)]
    methods += [Method(name, plan, sampler) for name, plan in plans.items()]
    labels = torch.tensor(labels_in_turn(SAMPLES, 26))
    errors: dict[str, list[float]] = {name: [] for name in plans}
    for seed in SEEDS:
        base, *others = run_methods(model, methods, labels, seed=seed, cfg_scale=scale, batch_size=BATCH)
        for name, run in zip(plans, others, strict=True):
            errors[name] += paired_error(run.images, base.images).tolist()
    return {name: statistics.mean(values) for name, values in errors.items()}


def moved(table: CacheTable, sampler: str, steps: int, shape: ModelShape) -> Plan | None:
    """The table's plan at another place; None where a step would read what none kept by then."""
    timesteps = make_sampler(sampler, steps).timesteps
    if table.sampler is not None and (table.sampler.name, table.timesteps) == (sampler, timesteps):
        return table.plan(shape)
    try:
        return table.retime(timesteps).plan(shape)
    except TableError:
        return None


def places() -> list[tuple[tuple[str, int, float], str, int, float]]:
    """Every home with each place that its table is tried at."""
    at_scales = [(home, home[0], home[1], scale) for home in HOMES for scale in SCALES]
    others = [(home, sampler, steps, SCALE) for home in HOMES for sampler in ("ddim", "ddpm") for steps in (20, 50)]
    return at_scales + [place for place in others if (place[1], place[2]) != place[0][:2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, default=RAW)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_letters().model
    shape = as_denoiser(model).shape
    rows: list[Row] = []
    for home, sampler, steps, scale in places():
        file = args.raw / f"row-{home[0]}-{home[1]}-{home[2]}-{sampler}-{steps}-{scale}.json"
        if not file.exists():
            table = table_of(model, args.raw, *home, SCALE)
            plan = moved(table, sampler, steps, shape)
            if plan is None:
                continue
            computed = sum(bool(step.computed) for step in plan.steps)
            plans = {"path": plan, "fora": fora_of(make_sampler(sampler, steps).timesteps, computed, shape)}
            at_home = (sampler, steps) == home[:2]
            if at_home and scale in FOUND_AT:
                plans["found_here"] = table_of(model, args.raw, *home, scale).plan(shape)
            errors = errors_of(model, plans, sampler, scale)
            name = f"{home[0]}-{home[1]}-{home[2]}x"
            row = Row(name, sampler, steps, scale, computed, errors["path"], errors["fora"], errors.get("found_here"))
            file.write_text(json.dumps(asdict(row)))
        rows.append(Row(**json.loads(file.read_text())))
        print(rows[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"seeds": SEEDS, "samples": SAMPLES, "machine": machine(), "rows": [asdict(row) for row in rows]}
    args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
