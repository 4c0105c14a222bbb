"""Which position of a step says best what type a table of other steps would have there.

    python -m bench.retime

Tables of the bundled model are calibrated for several numbers of DDIM steps, spread evenly over the timesteps or as
their squares, which are dense at low noise. Those of 20 steps are then moved to all others: every new step takes the
type of the step that is nearest by index, by timestep or by log-SNR, and the first stays NO_CACHE. What comes out is
held against the table that was calibrated there: how many steps have another type, what both cost, and how far both
are from the uncached samples of the same noise. It writes bench/results/retime.json.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebcache_fast import CacheTable, calibrate, sample
from ebcache_fast.apps.bundled import labels_in_turn, load_letters
from ebcache_fast.apps.quality import paired_error
from ebcache_fast.apps.report import machine
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import StepType
from ebcache_fast.samplers import Sampler, sampler_over
from ebcache_fast.samplers.schedule import TRAIN_STEPS, NoiseSchedule, respaced_timesteps

OUT = Path(__file__).resolve().parent / "results" / "retime.json"
STEPS, MOVED = (10, 12, 20, 30), 20
TARGETS = (1.5, 2.0)
SPACINGS: Mapping[str, Callable[[int], Sequence[int]]] = {
    "even": lambda steps: respaced_timesteps(TRAIN_STEPS, steps),
    "squares": lambda steps: squares(steps),
}
Positions = Callable[[Sequence[int]], Sequence[float]]


def squares(steps: int) -> Sequence[int]:
    """Timesteps whose square roots are spread evenly (Song et al., arXiv 2010.02502, appendix D.2)."""
    ascending = np.linspace(0.0, (TRAIN_STEPS - 1) ** 0.5, steps) ** 2
    return tuple(ascending.round().astype(int).tolist()[::-1])


def by_index(timesteps: Sequence[int]) -> Sequence[float]:
    """How far into the run each step is, from 0 to 1."""
    return np.linspace(0.0, 1.0, len(timesteps)).tolist()


def by_timestep(timesteps: Sequence[int]) -> Sequence[float]:
    """The timesteps themselves."""
    return timesteps


def by_log_snr(timesteps: Sequence[int]) -> Sequence[float]:
    """log(alpha_bar / (1 - alpha_bar)) of the linear schedule, which the model was trained with."""
    alpha_bar = NoiseSchedule.linear().train_alpha_bar[list(timesteps)]
    return np.log(alpha_bar / (1.0 - alpha_bar)).tolist()


POSITIONS: Mapping[str, Positions] = {"index": by_index, "timestep": by_timestep, "log_snr": by_log_snr}


def moved(table: CacheTable, timesteps: Sequence[int], positions: Positions) -> CacheTable:
    """The table at these timesteps, each of the type of the step nearest to it, the earlier one of two."""
    own, there = np.array(positions(table.timesteps)), np.array(positions(timesteps))
    nearest = np.abs(there[:, None] - own).argmin(axis=1)
    types = [StepType.NO_CACHE, *(table.step_types[i] for i in nearest[1:])]
    return CacheTable(timesteps, types)


def differing(one: CacheTable, other: CacheTable) -> int:
    """How many steps are of another type."""
    return sum(a is not b for a, b in zip(one.step_types, other.step_types, strict=True))


class Judge:
    """Costs of tables, and the errors of their samples; equal tables are sampled once."""

    def __init__(self, samples: int) -> None:
        self.model, self._labels = load_letters().model, labels_in_turn(samples, 26)
        self._shape = as_denoiser(self.model).shape
        self._made: dict[CacheTable, Tensor] = {}

    def __call__(self, table: CacheTable, sampler: Sampler) -> dict[str, float]:
        """How far the table's samples are from those of the same sampler without caching."""
        plain = CacheTable(table.timesteps, [StepType.NO_CACHE] * len(table))
        bare = CacheTable(table.timesteps, table.step_types)
        for each in {plain, bare} - self._made.keys():
            self._made[each] = sample(self.model, self._labels, table=each, sampler=sampler, seed=1)
        error = float(paired_error(self._made[bare], self._made[plain]).mean())
        return {"mac_limit": table.plan(self._shape).mac_limit(self._shape), "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=52, help="samples that vote for a table")
    parser.add_argument("--samples", type=int, default=52, help="samples that errors are taken of")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(args.samples)
    runs = {
        (spacing, steps): sampler_over("ddim", NoiseSchedule.linear().respace(timesteps(steps)))
        for spacing, timesteps in SPACINGS.items()
        for steps in STEPS
    }
    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        tables = {
            run: calibrate(judge.model, method="algorithm1", samples=args.votes, sampler=sampler, target_speedup=target)
            for run, sampler in runs.items()
        }
        for old, new in product(runs, runs):
            if old == new or old[1] != MOVED:
                continue
            row: dict[str, Any] = {"target": target, "from": old, "to": new}
            row["calibrated"] = judge(tables[new], runs[new])
            for name, positions in POSITIONS.items():
                table = moved(tables[old], runs[new].timesteps, positions)
                row[name] = {"differing": differing(table, tables[new]), **judge(table, runs[new])}
            rows.append(row)
            print(json.dumps(row), flush=True)
    alike = [row for row in rows if row["from"][0] == row["to"][0]]
    summary = {"same spacing": summed_up(alike), "other spacing": summed_up([row for row in rows if row not in alike])}
    print(json.dumps(summary, indent=1))
    report = {"votes": args.votes, "samples": args.samples, "rows": rows, "summary": summary, "machine": machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1))


def summed_up(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over moves, by position: the share of steps of another type, and what exceeds the calibrated table's."""
    return {
        name: {
            "differing_share": mean(row[name]["differing"] / row["to"][1] for row in rows),
            "mac_limit_more": mean(row[name]["mac_limit"] - row["calibrated"]["mac_limit"] for row in rows),
            "error_more": mean(row[name]["error"] - row["calibrated"]["error"] for row in rows),
        }
        for name in POSITIONS
    }


if __name__ == "__main__":
    main()
