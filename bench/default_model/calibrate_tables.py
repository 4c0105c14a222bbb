"""Calibrate the bundled model's tables, and those that only the experiments need.

    python -m bench.default_model.calibrate_tables --samples 520

The shipped ones go to ebcache_fast/assets/tables, the others to bench/results/tables. Existing files are kept unless
``--again``; each search resumes from bench/results/tables/progress.
"""

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from ebcache_fast import calibrate
from ebcache_fast.apps.bundled import load_letters
from ebcache_fast.calibration.algorithm1 import Algorithm1
from ebcache_fast.models import as_denoiser

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "ebcache_fast" / "assets" / "tables"
EXPERIMENTAL = ROOT / "bench" / "results" / "tables"
CRITERIA = {  # by what a table's name ends with: what it is called, and its choices
    "": ("vectors compared", Algorithm1()),  # ours
    "-norm": ("norms compared, no limit", Algorithm1(criterion="norm", max_run=None)),  # the paper's
    "-norm-run3": ("norms compared", Algorithm1(criterion="norm")),
    "-free": ("vectors compared, no limit", Algorithm1(max_run=None)),
    "-flat": ("vectors compared, flat threshold", Algorithm1(k=0.0)),
    "-falling": ("vectors compared, falling threshold", Algorithm1(a=0.2, k=-0.15)),
}
PATH, PATH_SAMPLES = "path", 208  # the path search, which none of these choices concern
TARGETS = (1.5, 2.5)
SCHEDULES = (("ddpm", 50), ("ddpm", 20), ("ddpm", 10), ("ddim", 20))
ABLATED = ("ddpm", 20)  # the only schedule with one table a switch


@dataclass(frozen=True)
class Wanted:
    """One table to make."""

    sampler: str
    steps: int
    target: float
    criterion: str  # a key of CRITERIA, or PATH

    @property
    def name(self) -> str:
        if self.criterion == PATH:
            return f"letters-path-{self.sampler}-{self.steps}-{self.target}x"
        return f"letters-{self.sampler}-{self.steps}-{self.target}x{self.criterion}"

    @property
    def described(self) -> str:
        """How it was made, in a few words."""
        return "the path search" if self.criterion == PATH else CRITERIA[self.criterion][0]

    @property
    def path(self) -> Path:
        shipped = self.criterion in ("", PATH) and self.steps >= 20
        return (SHIPPED if shipped else EXPERIMENTAL) / f"{self.name}.json"


def all_tables() -> list[Wanted]:
    """Every table of the experiments, shipped ones among them; the paper's form for DDPM, all others for one."""
    return [
        Wanted(sampler, steps, target, criterion)
        for criterion in CRITERIA
        for sampler, steps in SCHEDULES
        for target in TARGETS
        if not criterion or (sampler, steps) == ABLATED or (criterion == "-norm" and sampler == "ddpm")
    ]


def path_tables() -> list[list[Wanted]]:
    """The path search's, those of one measurement after each other."""
    return [[Wanted(*schedule, target, PATH) for target in TARGETS] for schedule in SCHEDULES if schedule[1] >= 20]


def make_all(wanted: list[Wanted], samples: int) -> str:
    """`make` one after another."""
    return "\n".join(make(single, samples) for single in wanted)


def make(wanted: Wanted, samples: int) -> str:
    """Calibrate and save one table; returns a line about it."""
    torch.set_num_threads(1)
    model = load_letters().model
    is_path = wanted.criterion == PATH
    name = wanted.name.removesuffix(f"-{wanted.target}x") if is_path else wanted.name  # one measurement for all targets
    progress = EXPERIMENTAL / "progress" / f"{name}.json"
    progress.parent.mkdir(parents=True, exist_ok=True)
    table = calibrate(
        model,
        samples=PATH_SAMPLES if is_path else samples,
        steps=wanted.steps,
        sampler=wanted.sampler,
        algorithm=None if is_path else CRITERIA[wanted.criterion][1],
        target_speedup=wanted.target,
        batch_size=64,
        progress_file=progress,
    )
    table.save(wanted.path)
    shape = as_denoiser(model).shape
    counts = dict(Counter(table.type_names))
    return f"{wanted.name}: {counts}, {table.plan(shape).mac_limit(shape):.2f}x by MACs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=520)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    groups = [*([wanted] for wanted in all_tables()), *path_tables()]
    waiting = [[wanted for wanted in group if args.again or not wanted.path.exists()] for group in groups]
    with ProcessPoolExecutor(args.workers) as pool:
        for future in as_completed(pool.submit(make_all, group, args.samples) for group in waiting if group):
            print(future.result(), flush=True)


if __name__ == "__main__":
    main()
