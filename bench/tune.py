"""Find each kernel's launch parameters on the GPU at hand, for the table in kernels/launch.py.

    python -m bench.tune [--kernel gated_residual ...] [--rows 512 4096 16384] [--px 256] [--out FILE]
    python -m bench.tune --dry-run          two candidates a kernel under the interpreter, tiny: proves the script

For each kernel and number of rows, a bounded list of candidates is installed in turn, the table's present entry first.
One that raises, or whose result does not keep the rule of accuracy (against float64 an error of at most twice torch's
own plus 2 ulp of the largest value), is out. The rest take turns under the device timer; the fastest wins, but the
present entry stays where nothing beats it by more than 2%. It prints entries ready for the table and writes every
measurement to a JSON file. Without a GPU it says so and exits 0.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from bench.kernel_contenders import CONTENDERS, TINY, BoundCall, Judge, Round, bound, interleaved, rotation, timer, work
from bench.kernel_operands import XL_256, XL_512, KernelOperands, ModelSizes
from bench.telemetry import telemetry
from ebcache_fast.kernels import launch
from ebcache_fast.kernels.launch import Launch

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "tune.json"
MODELS = {256: XL_256, 512: XL_512}
WORTH = 0.98  # a candidate's time over that of the present entry: noise is no reason to change the table
ROUNDS = 15


@dataclass(frozen=True)
class Search:
    """What is tried for a kernel, and the calls of `bench.kernel_cases.CALLS` that it must do well, together."""

    calls: tuple[str, ...]
    candidates: tuple[Launch, ...]


def grid(
    rows: Sequence[int], cols: Sequence[int], warps: Sequence[int], stages: Sequence[int] = (1,), largest: int = 1 << 15
) -> tuple[Launch, ...]:
    """Every combination whose tile has at most ``largest`` elements: beyond, registers or shared memory run out."""
    return tuple(Launch(*each) for each in product(rows, cols, warps, stages) if each[0] * each[1] <= largest)


SEARCHES = {
    "gated_residual": Search(("residual, norm", "2 residuals, norm"), grid((1, 2, 4, 8), (0,), (2, 4, 8))),
    "tokens": Search(("gather", "scatter"), grid((1, 2, 4, 8), (0,), (2, 4, 8))),
    "gated_sum": Search(("sum for 1 step", "sum for 3 steps"), grid((8, 16, 32), (64, 128, 256), (4, 8), (3, 5), 4096)),
    "embed": Search(("embed, norm",), grid((16, 32, 64), (64, 128, 256), (4, 8), (1,), 8192)),
    "head": Search(("head, DDPM",), grid((16, 32), (64, 128, 256), (4, 8), (1,), 4096)),
    "run": Search(("run of 3 steps",), grid((16, 32), (64, 128, 256), (4, 8), (1,), 4096)),
    "linear_gelu": Search(("linear, GELU",), grid((64, 128, 256), (64, 128, 256), (4, 8), (3, 4))),
    "attention": Search(("attention",), grid((64, 128), (32, 64, 128), (4, 8), (2, 3))),
    "window_attention": Search(("window attention",), grid((64, 128), (32, 64, 128), (4, 8), (2, 3))),
}


@dataclass(frozen=True)
class Size:
    """What the calls are made for."""

    model: ModelSizes
    samples: int  # guided, so that there are twice as many batch rows
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        return 2 * self.samples * self.model.tokens

    def call(self, name: str) -> BoundCall:
        """One of `bench.kernel_cases.CALLS` with operands of its own."""
        return bound(name, KernelOperands(self.model, self.samples, self.dtype, self.device))

    def rotation(self, name: str) -> int:
        """How many of them to time in turn."""
        return rotation(work(name, self.model, self.samples, self.dtype.itemsize).bytes, self.device)


@dataclass(frozen=True)
class Trial:
    """What became of one candidate."""

    launch: Launch
    rejected: str | None = None  # why, in a line
    seconds: tuple[float, ...] = ()  # a call of each kind together, by round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.inf


@contextmanager
def installed(kernel: str, candidate: Launch) -> Iterator[None]:
    """The table with one entry for a kernel, whatever the rows and the architecture."""
    table = {**launch.TABLE, kernel: {launch.DEFAULT_ARCH: ((launch.ALL, candidate),)}}
    with patch.object(launch, "TABLE", table):
        yield


def try_all(kernel: str, search: Search, size: Size, rounds: int) -> list[Trial]:
    """Check every candidate, then time those that are right in turns, by rounds."""
    judges = [Judge(size.call(name)) for name in search.calls]
    objections = {candidate: objection(kernel, candidate, judges) for candidate in search.candidates}
    del judges  # they hold every operand in float64
    sets = [[size.call(name) for _ in range(size.rotation(name))] for name in search.calls]
    timers = {}
    for candidate in (each for each, why in objections.items() if why is None):
        with installed(kernel, candidate):
            calls = [timer(CONTENDERS["Triton"](same[0].operation), same, size.device) for same in sets]
        timers[str(candidate)] = partial(timed, kernel, candidate, calls)
    seconds = interleaved(rounds, timers)
    return [Trial(each, why, tuple(seconds.get(str(each), ()))) for each, why in objections.items()]


def timed(kernel: str, candidate: Launch, calls: Sequence[Round]) -> float:
    """One round of each call, added up. A captured graph has its candidate inside, a call on the host has not."""
    with installed(kernel, candidate):
        return sum(call() for call in calls)


def objection(kernel: str, candidate: Launch, judges: Sequence[Judge]) -> str | None:
    """The first judge's reason against a candidate, or what it raised."""
    try:
        with installed(kernel, candidate):
            return next(filter(None, (judge.objection() for judge in judges)), None)
    except Exception as raised:  # too much shared memory, too many registers, what a compiler does not like
        return f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest that is right; the first, the present one, where nothing is clearly faster; None if none is right."""
    fastest, present = min(trials, key=lambda trial: trial.median), trials[0]
    if fastest.median == math.inf:
        return None
    return fastest if fastest.median < WORTH * present.median else present


def entry(kernel: str, winners: Sequence[tuple[int, Launch]], arch: int) -> str:
    """Winners by rising rows as a line for the table; the last holds for all rows beyond."""
    following = [*(launch for _, launch in winners[1:]), None]
    kept = [(rows, won) for (rows, won), after in zip(winners, following, strict=True) if won != after]
    limits = [*(str(rows) for rows, _ in kept[:-1]), "ALL"]
    pairs = ", ".join(f"({limit}, {won})" for limit, (_, won) in zip(limits, kept, strict=True))
    return f'"{kernel}": {{{arch}: ({pairs},)}},'


def tune(kernel: str, sizes: Sequence[Size], most: int, rounds: int) -> dict[str, Any]:
    """A kernel's winners by rising rows, the entry they make, and every measurement, ready for JSON."""
    winners, measured = [], []
    for size in sorted(sizes, key=lambda size: size.rows):
        present = launch.parameters(kernel, size.rows, size.device)
        candidates = tuple(dict.fromkeys([present, *SEARCHES[kernel].candidates]))[:most]
        trials = try_all(kernel, replace(SEARCHES[kernel], candidates=candidates), size, rounds)
        won = best(trials)
        if won:
            winners.append((size.rows, won.launch))
            print(
                f"{kernel}, {size.rows} rows: {won.median * 1e6:.1f} us, now {trials[0].median * 1e6:.1f}; {won.launch}"
            )
        else:
            print(f"{kernel}, {size.rows} rows: no candidate is right; {trials[0].rejected}")
        measured.append({"rows": size.rows, "model": size.model.name, "trials": [told(trial) for trial in trials]})
    line = entry(kernel, winners, launch.arch_of(sizes[0].device)) if winners else None
    return {"kernel": kernel, "dtype": str(sizes[0].dtype), "entry": line, "measured": measured}


def told(trial: Trial) -> dict[str, Any]:
    """A trial for JSON."""
    return {"launch": trial.launch._asdict(), "rejected": trial.rejected, "seconds": trial.seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 also without a GPU, 1 if no candidate of some kernel is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--px", type=int, choices=MODELS, default=256, help="DiT-XL/2 of this size")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 4096, 16384], help="tokens of a guided batch")
    parser.add_argument("--dry-run", action="store_true", help="two candidates each, interpreted")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if args.dry_run:
        if not triton.knobs.runtime.interpret:  # read when kernels are defined, so in a process of its own
            command = [sys.executable, "-m", "bench.tune", *(sys.argv[1:] if argv is None else argv)]
            return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT).returncode
        sizes, most, rounds = [Size(TINY, 1, torch.float16, torch.device("cpu"))], 2, 1
    elif not torch.cuda.is_available():
        print(
            "no GPU: torch.cuda.is_available() is False, and launch parameters are found on one; --dry-run needs none"
        )
        return 0
    else:
        sizes, most, rounds = gpu_sizes(parser, MODELS[args.px], args.rows), sys.maxsize, ROUNDS
    start = telemetry()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = list[dict[str, Any]]()
    for kernel in args.kernel:  # each a while: what was found is kept
        found.append(tune(kernel, sizes, most, rounds))
        args.out.write_text(json.dumps({"telemetry": {"start": start, "end": telemetry()}, "kernels": found}, indent=1))
    print("Interpreted: these entries mean nothing." if args.dry_run else f"For the table, from {args.out}:")
    print(*(one["entry"] for one in found if one["entry"]), sep="\n")
    return 0 if all(one["entry"] for one in found) else 1


def gpu_sizes(parser: argparse.ArgumentParser, model: ModelSizes, rows: Sequence[int]) -> list[Size]:
    """The batches with these numbers of rows."""
    whole = 2 * model.tokens
    for count in rows:
        if count < whole or count % whole:
            parser.error(f"{count} rows are no guided batch of {model.name}; give multiples of {whole}")
    return [Size(model, count // whole, torch.bfloat16, torch.device("cuda")) for count in rows]


if __name__ == "__main__":
    sys.exit(main())
