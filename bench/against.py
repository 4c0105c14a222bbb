"""What a step costs here against another checkout of this repository, such as the commit before a large change.

    python -m bench.against CHECKOUT [--turns 7]

The two take turns, each in processes of its own, so that they share the machine's moments: `bench.host_cost`, what one
step costs the host outside of its graph, and `bench.cpu_speedup`, whole runs on a CPU, each checkout by its own
scripts. Figures are medians of the turns' ratios, this checkout's time over the other's, with quartiles: 1 is equal,
below 1 is less. It writes bench/results/against.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ebcache_fast.apps.report import machine

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "against.json"
HOST_ROUNDS, CPU_ROUNDS = 10, 2  # of each script in each turn


def times_of(checkout: Path, rounds: Mapping[str, int]) -> Iterator[tuple[str, float]]:
    """Names and times of one turn of a checkout: microseconds a step of the host, seconds a batch of whole runs."""
    for script, count in rounds.items():
        for i, (name, value) in enumerate(_figures(_run(checkout, script, count))):
            yield f"{script} {i}: {name}", value


def _run(checkout: Path, script: str, rounds: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", f"bench.{script}", "--rounds", str(rounds), "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, way in report.get("ways", {}).items():
        yield name, way.get("step_us_with_known_fingerprint", way["step_us"])["median"]
    for method in report.get("methods", ()):
        yield method["name"], method["median_seconds_a_batch"]


def compared(other: Path, turns: int, rounds: Mapping[str, int]) -> list[dict[str, Any]]:
    """Every figure of both checkouts: medians, and those of the ratios turn by turn. What names differ in is ours."""
    # By turns, pairs of (name, time).
    seen = [list(zip(times_of(ROOT, rounds), times_of(other, rounds), strict=True)) for _ in range(turns)]
    rows = []
    for pairs in zip(*seen, strict=True):
        ratios = [here / there for (_, here), (_, there) in pairs]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        here, there = (statistics.median(pair[side][1] for pair in pairs) for side in (0, 1))
        name = pairs[0][0][0]
        rows.append({"name": name, "here": here, "there": there, "ratio": median, "quartiles": [low, high]})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--host-rounds", type=int, default=HOST_ROUNDS)
    parser.add_argument("--cpu-rounds", type=int, default=CPU_ROUNDS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    load = os.getloadavg()
    rounds = {"host_cost": args.host_rounds, "cpu_speedup": args.cpu_rounds}
    rows = compared(args.checkout.resolve(), args.turns, rounds)
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['name']}: {row['ratio']:.3f} [{low:.3f}, {high:.3f}] ({row['here']:.4g} against {row['there']:.4g})"
        )
    commit = _git(args.checkout, "rev-parse", "HEAD")
    report = {
        "against": commit, "commit": _git(ROOT, "rev-parse", "HEAD"), "turns": args.turns, "rounds": rounds,
        "figures": rows, "machine": machine(), "load_average": {"start": load, "end": os.getloadavg()},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _git(checkout: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
