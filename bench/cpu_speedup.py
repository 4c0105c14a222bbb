"""Wall clock on a CPU: how much of the speed-up that the MACs allow is had.

    python -m bench.cpu_speedup

Methods take turns in one process, so that all share the machine's moment; figures are medians of the rounds' ratios,
with quartiles. It writes bench/results/cpu-speedup.json.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from ebcache_fast.apps.bundled import labels_in_turn, load_letters
from ebcache_fast.apps.compare import Method, run_methods
from ebcache_fast.apps.demo import SPEEDUPS, tables_of
from ebcache_fast.apps.method_spec import Setting, open_table
from ebcache_fast.apps.report import machine
from ebcache_fast.models import as_denoiser

OUT = Path(__file__).resolve().parent / "results" / "cpu-speedup.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=26)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model = load_letters().model
    shape = as_denoiser(model).shape
    uncached = Setting(shape, 50, "ddpm").uncached(50)
    methods = [Method("No cache", uncached)]
    tables = [named for x in SPEEDUPS for named in tables_of("ddpm", x)]
    methods += [Method(name, open_table(table).plan(shape)) for name, table in tables]
    labels = torch.tensor(labels_in_turn(args.batch * args.rounds, 26))
    runs = run_methods(model, methods, labels, batch_size=args.batch)
    rows = []
    for method, run in zip(methods, runs, strict=True):
        ratios = [base / own for base, own in zip(runs[0].seconds, run.seconds, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        limit = method.plan.mac_limit(shape)
        rows.append(
            {
                "name": method.name,
                "median_seconds_a_batch": statistics.median(run.seconds),
                "speedup": median,
                "speedup_quartiles": [low, high],
                "mac_limit": limit,
                "share_of_limit": median / limit,
            }
        )
        print(f"{method.name}: {median:.3f}x [{low:.3f}, {high:.3f}], limit {limit:.3f}x, {median / limit:.3f} of it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"batch": args.batch, "rounds": args.rounds, "steps": 50, "methods": rows, "machine": machine()}
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
