"""What we set out to reach on an H200, and whether the committed results say that we did.

    python -m bench.targets            reads bench/results/h200-*.json, writes h200-targets.json beside them

A target that nothing was measured for says so, and is not met.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.rivals.roster import FP8, OURS

RESULTS = Path(__file__).resolve().parent / "results"
OUT, TEXT_STEPS = "h200-targets.json", "h200-text-steps.json"
Measure = Callable[["Results"], float | None]


@dataclass(frozen=True)
class Results:
    """The results in a folder."""

    folder: Path

    def race(self, samples: int, table: str = "released", px: int = 256) -> dict[str, Any]:
        """A race of `bench.rivals`; {} where there is none."""
        return self._read(f"h200-rivals-{table}-{px}px-B{samples}.json")

    def contender(self, samples: int, name: str, table: str = "released", px: int = 256) -> dict[str, Any]:
        """What a race found of one contender; {} where it did not run."""
        return contender_of(self.race(samples, table, px), name)

    def loop(self, samples: int, name: str) -> float | None:
        """Milliseconds of a run under the released table."""
        found = self.contender(samples, name)
        return float(found["loop_ms"]["median"]) if found else None

    def step(self, samples: int, kind: str, table: str) -> float | None:
        """Milliseconds of our step of a type."""
        return step_of(self.contender(samples, OURS, table), kind)

    def text_step(self, model: str, kind: str) -> float | None:
        """The same of a model of `bench.text_steps`."""
        races = self._read(TEXT_STEPS).get("models", ())
        return step_of(contender_of(next((one for one in races if one["model"] == model), {}), OURS), kind)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return dict(json.loads(path.read_text())) if path.exists() else {}


def contender_of(race: dict[str, Any], name: str) -> dict[str, Any]:
    """What a race found of one contender; {} where it did not run."""
    return next((one for one in race.get("contenders", ()) if one["name"] == name and not one["why"]), {})


def step_of(contender: dict[str, Any], kind: str) -> float | None:
    """Milliseconds of its step of a type."""
    found = contender.get("step_ms", {}).get(kind)
    return float(found["median"]) if found else None


@dataclass(frozen=True)
class Target:
    """A limit, and where its figure comes from."""

    name: str
    limit: float
    measure: Measure
    unit: str = ""
    at_most: bool = False


@dataclass(frozen=True)
class Judged:
    """A target beside what was measured; ``met`` is None where nothing was."""

    name: str
    target: float
    unit: str
    at_most: bool
    measured: float | None
    met: bool | None


def loop(samples: int, name: str = OURS) -> Measure:
    """A run."""
    return lambda results: results.loop(samples, name)


def step(samples: int, kind: str, table: str = "mixed") -> Measure:
    """A step of ours."""
    return lambda results: results.step(samples, kind, table)


def over(one: Measure, other: Measure) -> Measure:
    """How many times the other's figure one's is."""

    def ratio(results: Results) -> float | None:
        above, below = one(results), other(results)
        return None if above is None or below is None else above / below

    return ratio


def at_most_of_text(model: str, kind: str, limit: float) -> Target:
    """A step of ours of a model of `bench.text_steps`, in milliseconds."""
    return Target(f"{model}, B=1: {kind}", limit, lambda results: results.text_step(model, kind), "ms", at_most=True)


def against(samples: int, rivals: dict[str, float]) -> tuple[Target, ...]:
    """How many times our time each rival takes at least."""
    return tuple(
        Target(f"256 px, B={samples}: {name} over ours", limit, over(loop(samples, name), loop(samples)))
        for name, limit in rivals.items()
    )


TARGETS: tuple[Target, ...] = (
    Target("256 px, B=1, released table: a run", 40, loop(1), "ms", at_most=True),
    *against(1, {"P1": 4.5, "P2": 12, "P3": 2.2, "P5": 1.4}),
    Target("256 px, B=1: NO_CACHE", 1.15, step(1, "NO_CACHE"), "ms", at_most=True),
    Target("256 px, B=1: ATTENTION", 0.72, step(1, "ATTENTION"), "ms", at_most=True),
    Target("256 px, B=1: ATTN_MLP", 0.030, step(1, "ATTN_MLP", "released"), "ms", at_most=True),
    Target(
        "256 px, B=1: ATTN_MLP over NO_CACHE",
        0.03,
        over(step(1, "ATTN_MLP", "released"), step(1, "NO_CACHE", "released")),
        at_most=True,
    ),
    Target("256 px, B=1: uncached over cached", 1.44, over(loop(1, f"{OURS}, uncached"), loop(1))),
    Target("256 px, B=64: NO_CACHE", 52, step(64, "NO_CACHE", "released"), "ms", at_most=True),
    *against(64, {"P1": 1.4, "P3": 1.6, "P5": 1.12}),
    Target("256 px, B=64: bfloat16 over FP8", 1.2, over(loop(64), loop(64, FP8))),
    at_most_of_text("PixArt-Sigma 1024", "NO_CACHE", 24),
    at_most_of_text("PixArt-Sigma 2048", "NO_CACHE", 190),
    at_most_of_text("CogVideoX-2B", "NO_CACHE", 400),
    at_most_of_text("CogVideoX-2B", "ATTENTION", 95),
    Target("host, a step of our own loop", 10, lambda results: host(results), "µs", at_most=True),
    Target("256 px, B=1: memory over what the run needs", 1.15, lambda results: memory(results, 1), at_most=True),
    Target("256 px, B=64: memory over what the run needs", 1.15, lambda results: memory(results, 64), at_most=True),
)


def host(results: Results) -> float | None:
    """Microseconds of a step on the host, at B=1."""
    found = results.contender(1, OURS)
    return float(found["host_us_a_step"]["median"]) if found else None


def memory(results: Results, samples: int) -> float | None:
    """Our peak over weights, caches, modulation, noise and activations."""
    race, ours = results.race(samples), results.contender(samples, OURS)
    return ours["peak_bytes"] / race["needed_bytes"] if ours and ours["peak_bytes"] else None


def judge(results: Results) -> list[Judged]:
    """Every target."""
    judged = []
    for target in TARGETS:
        measured = target.measure(results)
        holds = None if measured is None else (measured <= target.limit if target.at_most else measured >= target.limit)
        judged.append(Judged(target.name, target.limit, target.unit, target.at_most, measured, holds))
    return judged


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if a target that was measured does not hold, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder")
    args = parser.parse_args(argv)
    judged = judge(Results(args.results))
    for one in judged:
        told = "not measured" if one.measured is None else f"{one.measured:.4g} {one.unit}"
        print(f"{one.name}: {told}, {'at most' if one.at_most else 'at least'} {one.target:g} {one.unit}".rstrip())
    (args.results / OUT).write_text(json.dumps({"targets": [asdict(one) for one in judged]}, indent=1) + "\n")
    return 1 if any(one.met is False for one in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
