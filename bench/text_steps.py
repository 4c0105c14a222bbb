"""How long steps of PixArt-Sigma (1024, 2048 px) and CogVideoX-2B (49 frames of 720x480) take, beside diffusers'.

    python -m bench.text_steps [--models NAME ...] [--only NAME ...] [--rounds 7] [--minutes M] [--out FILE]
    python -m bench.text_steps --dry-run          tiny, on the CPU: proves all that is installed, measures nothing
    python -m bench.text_steps --list

One guided sample in bfloat16 with random weights, none of them zero. Contenders take turns as in `bench.rivals`, eight
steps at a time: three NO_CACHE, an ATTENTION, an ATTN_MLP, a run of three. Uncached ones compute all eight. Times are
the device's between events; floors are by the ceilings that the same run measured; the error of each is held against
the method in float32, around diffusers' own layers. Peaks of memory stand beside what a run of ours needs.

The file is written after every round, so that an end that is forced costs only what was not measured yet. Packages and
caches: as for `bench.rivals`.
"""

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.rivals.outcome import RESULTS, chosen, lines, machine, outcome, worst
from bench.rivals.race import LEAST_ROUNDS, words
from bench.rivals.rival import Rival
from bench.rivals.roster import TEXT_RIVALS
from bench.text_cases import MODELS, TextModel, case_of, most_bytes

GIB = 2**30
TABLE = "every kind"
Keep = Callable[[dict[str, Any]], None]


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if a model or a contender that is installed did not run, else 0."""
    args = parse(argv)
    if args.list:
        print(*(f"{rival.name}: {rival.what}" for rival in TEXT_RIVALS), *MODELS, sep="\n")
        return 0
    if find_spec("diffusers") is None:
        print("no diffusers here: carry the wheels that bench.rivals names")
        return 1
    if not torch.cuda.is_available() and not args.dry_run:
        print("no GPU: torch.cuda.is_available() is False, so there is nothing to measure; --dry-run needs none")
        return 0
    rivals, ends = chosen(TEXT_RIVALS, args.only), time.perf_counter() + 60 * args.minutes
    found: dict[str, Any] = {"dry_run": args.dry_run, "diffusers": version("diffusers"), "models": []}
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(one: dict[str, Any]) -> None:
        args.out.write_text(json.dumps(found | {"models": [*found["models"], one]}, indent=1) + "\n")

    for i, name in enumerate(args.models):
        seconds = (ends - time.perf_counter()) / (len(args.models) - i)
        one = measured(MODELS[name], rivals, args.rounds, seconds, keep, dry=args.dry_run)
        keep(one)
        found["models"].append(one)
        print(*lines(found["models"][-1]["contenders"]), args.out, sep="\n", flush=True)
    return int(any(one["why"] or worst(one["contenders"]) for one in found["models"]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.text_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the contenders")
    parser.add_argument("--rounds", type=int, default=7, help=f"at least {LEAST_ROUNDS}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="take so long, with fewer rounds or rivals")
    parser.add_argument(
        "--out", type=Path, help="default: h200-text-steps.json, named after the GPU, in $OUT or bench/results"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--list", action="store_true", help="say who competes")
    args = parser.parse_args(argv)
    if args.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds {args.rounds} is below {LEAST_ROUNDS}, of which no quartiles can be taken")
    if args.out is None:
        args.out = Path(os.environ.get("OUT") or RESULTS) / f"{machine(dry_run=args.dry_run)}-text-steps.json"
    return args


def measured(
    model: TextModel, rivals: Sequence[Rival], rounds: int, seconds: float, keep: Keep, *, dry: bool
) -> dict[str, Any]:
    """The race of one model; ``why`` not, where it has none: the others' are not lost with it.

    ``keep`` gets what there is of it after each round.
    """
    needed, most = most_bytes(model, rivals)
    print(f"{model.label}: a run of ours needs {needed / GIB:.1f} GiB, all at most {most / GIB:.1f} GiB", flush=True)
    about = {"model": model.label, "table": TABLE, "most_bytes": most, "why": None}
    try:
        case = case_of(model, torch.device("cpu" if dry else "cuda"), tiny=dry)
        return about | outcome(case, rivals, rounds, seconds, lambda told: keep(about | told))
    except Exception as error:  # whatever a driver or the memory may say
        return about | {"why": words(error), "contenders": []}
    finally:
        free()


def free() -> None:
    """Give back what a model's contenders held: code that was compiled, graphs, memory."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
