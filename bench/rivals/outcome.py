"""What a race of one case leaves: everything measured, ready for JSON, and a few lines of it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import measure_ceilings, product_rates
from bench.rivals.case import Case
from bench.rivals.race import Entry, needed_bytes, race
from bench.rivals.rival import Rival
from bench.rivals.roof import floors, products
from bench.rivals.roster import OURS
from bench.telemetry import telemetry

RESULTS = Path(__file__).resolve().parents[1] / "results"
CEILING_ROUNDS = 15


def outcome(
    case: Case,
    rivals: Sequence[Rival],
    rounds: int,
    seconds: float,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the race beside this device's ceilings; ``keep`` gets all that is known after each round."""
    start = telemetry()
    ceilings = measure_ceilings(case.device, CEILING_ROUNDS)
    rates = product_rates(products(case), case.device, case.dtype, CEILING_ROUNDS)

    def told(entries: Sequence[Entry]) -> dict[str, Any]:
        return {
            "samples": case.samples, "steps": len(case.plan),
            "dtype": str(case.dtype).removeprefix("torch."), "cfg_scale": case.cfg_scale,
            "step_types": {kind.name: count for kind, count in case.plan.counts().items() if kind is not None},
            "mac_limit": case.plan.mac_limit(case.denoiser.shape), "needed_bytes": needed_bytes(case),
            "ceilings": vars(ceilings), "floor_ms": floors(case, ceilings),
            "product_flops_per_second": rates,
            "contenders": [entry.told() for entry in entries], "telemetry": {"start": start, "end": telemetry()},
        }  # fmt: skip

    def say(text: str) -> None:
        print(text, flush=True)

    return told(race(case, rivals, rounds, say, seconds, lambda entries: keep(told(entries))))


def machine(*, dry_run: bool) -> str:
    """What results are called after: h200 for NVIDIA's H200."""
    return "dry" if dry_run or not torch.cuda.is_available() else torch.cuda.get_device_name().split()[-1].lower()


def chosen(roster: Sequence[Rival], names: Sequence[str] | None) -> list[Rival]:
    """Those of these names, or all; SystemExit where one is nobody's."""
    known = {rival.name: rival for rival in roster}
    if unknown := [name for name in names or () if name not in known]:
        raise SystemExit(f"--only {unknown[0]!r} is none of {', '.join(known)}; --list says who they are")
    return list(roster) if names is None else [known[name] for name in names]


def lines(contenders: Sequence[dict[str, Any]]) -> list[str]:
    """One each: its time, and how many times ours that is."""
    loops = {one["name"]: one["loop_ms"]["median"] for one in contenders if not one["why"]}
    base = loops.get(OURS)
    return [
        f"{name}: {loop:.2f} ms" + (f", {loop / base:.2f} times ours" if base and name != OURS else "")
        for name, loop in loops.items()
    ]


def worst(contenders: Sequence[dict[str, Any]]) -> int:
    """A command's exit status: 1 if a contender that is installed did not run, else 0."""
    return int(any(one["why"] and not one["why"].startswith("needs") for one in contenders))
