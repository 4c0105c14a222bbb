"""The command; see the package."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bench.rivals
from bench.rivals.case import Case
from bench.rivals.outcome import RESULTS, chosen, lines, machine, outcome, worst
from bench.rivals.race import LEAST_ROUNDS
from bench.rivals.roster import RIVALS
from bench.rivals.switches import SWITCHES
from bench.step_cases import MIXED, RELEASED, model_of, plan_from
from ebcache_fast.models import DIT_MODELS, as_denoiser

ROSTERS = {"rivals": RIVALS, "switches": SWITCHES}
TABLES = {"released": RELEASED, "mixed": MIXED}
DRY_STEPS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if a contender that is installed did not run, else 0."""
    args = parse(argv)
    if args.list:
        print(*(f"{rival.name}: {rival.what}" for rival in ROSTERS[args.roster]), sep="\n")
        return 0
    if not torch.cuda.is_available() and not args.dry_run:
        print("no GPU: torch.cuda.is_available() is False, so there is nothing to measure; --dry-run needs none")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = measure(args)
    print(*lines(found["contenders"]), args.out, sep="\n")
    return worst(found["contenders"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rivals",
        description=bench.rivals.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--px", type=int, default=256, choices=(256, 512), help="of DiT-XL/2's pictures")
    parser.add_argument("--samples", type=int, default=1, help="guided: there are twice as many rows")
    parser.add_argument("--table", default="released", choices=TABLES)
    parser.add_argument("--roster", default="rivals", choices=ROSTERS, help="who competes: ourselves by switch, or all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them")
    parser.add_argument("--rounds", type=int, default=15, help=f"at least {LEAST_ROUNDS}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="take so long, with fewer rounds or rivals")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: h200-rivals-*.json, named after the GPU, in $OUT or bench/results",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--list", action="store_true", help="say who competes")
    args = parser.parse_args(argv)
    if args.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds {args.rounds} is below {LEAST_ROUNDS}, of which no quartiles can be taken")
    if args.out is None:
        name = f"{machine(dry_run=args.dry_run)}-{args.roster}-{args.table}-{args.px}px-B{args.samples}.json"
        args.out = Path(os.environ.get("OUT") or RESULTS) / name
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the race; all that was found, which the file has by now, and had after each round."""
    device = torch.device("cpu" if args.dry_run else "cuda")
    model = tiny_model() if args.dry_run else model_of(args.px, device, torch.bfloat16)
    case = case_of(model, args.table, args.samples, DRY_STEPS if args.dry_run else None)
    about = {
        "dry_run": args.dry_run,
        "model": "tiny" if args.dry_run else f"DiT-XL/2 {args.px} px",
        "table": args.table,
    }
    rivals = chosen(ROSTERS[args.roster], args.only)

    def keep(told: dict[str, Any]) -> None:
        args.out.write_text(json.dumps(about | told, indent=1) + "\n")

    told = outcome(case, rivals, args.rounds, 60 * args.minutes, keep)
    keep(told)
    return about | told


def case_of(model: nn.Module, table: str, samples: int, steps: int | None) -> Case:
    """A table over a model, or its first ``steps`` steps."""
    return Case(model, plan_from(TABLES[table][:steps], as_denoiser(model).shape), samples)


def tiny_model() -> nn.Module:
    """For a dry run."""
    torch.manual_seed(0)
    made = DIT_MODELS["DiT-S/4"](input_size=8, hidden_size=64, depth=2, num_heads=4, num_classes=5)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.eval().requires_grad_(False)


if __name__ == "__main__":
    sys.exit(main())
