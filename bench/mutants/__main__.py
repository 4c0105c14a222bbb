"""The command; see the package."""

import argparse
import ast
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import bench.mutants
from bench.mutants.campaign import try_all
from bench.mutants.errors import MutationError
from bench.mutants.explained import read_explanations, stale
from bench.mutants.find import Mutant, anywhere, find, in_kernels, in_launchers
from bench.mutants.report import Report, diff, table, write_json
from bench.mutants.tree import engine_files, kernel_files
from bench.mutants.worker import workers

ROOT = Path(__file__).resolve().parents[2]
EXPLANATIONS = Path("bench", "mutants_equivalent.txt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if nothing is left to do, 1 if something is, 2 if it could not run."""
    try:
        return run(parse(arguments))
    except MutationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mutants",
        description=bench.mutants.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", metavar="FILE", help="a file, as kernels/x.py; may be repeated")
    parser.add_argument("--launchers", action="store_true", help="mutate the plain functions too")
    parser.add_argument(
        "--sample", type=positive, metavar="N", help="so many at random of those without an explanation"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--jobs", type=positive, default=1, help="processes, each with a copy of the tree")
    parser.add_argument("--slack", type=float, default=3.0, help="seconds that any test may work beyond its multiple")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the tree to mutate")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number from 1; ValueError, which argparse reports, if it is none."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    if args.list:
        print(*map(diff, choose(args, args.root)), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder, workers(args.root, Path(folder), args.jobs) as staff:
        tree = staff[0].tree  # from here on nobody else writes to what is read
        chosen = choose(args, tree)
        results = try_all(staff, chosen, args.slack, partial(print, file=sys.stderr, flush=True))
        reasons = read_explanations(tree / EXPLANATIONS)
        report = Report(results, reasons, stale(reasons, everywhere(tree)))
    print(table(report))
    if args.out:
        write_json(report, args.out, only=args.only, launchers=args.launchers, sample=args.sample, seed=args.seed)
    return 0 if report.passed else 1


def choose(args: argparse.Namespace, tree: Path) -> list[Mutant]:
    """The mutants that the arguments ask for."""
    files = [*kernel_files(tree), *engine_files(tree)]
    unknown = [file for file in args.only or () if file not in files]
    if unknown:
        raise MutationError(f"--only {unknown[0]} is none of {', '.join(files)}; name one of them")
    launchers = mutants(tree, kernel_files(tree), in_launchers) if args.launchers else []
    chosen = [
        *mutants(tree, kernel_files(tree), in_kernels), *launchers, *mutants(tree, engine_files(tree), anywhere)
    ]  # fmt: skip
    chosen = [mutant for mutant in chosen if not args.only or mutant.file in args.only]
    if args.sample is None:
        return chosen
    reasons = read_explanations(tree / EXPLANATIONS)
    open_ones = [mutant for mutant in chosen if mutant.key not in reasons]
    return random.Random(args.seed).sample(open_ones, min(args.sample, len(open_ones)))


def everywhere(tree: Path) -> list[Mutant]:
    """All that can be asked for."""
    return mutants(tree, [*kernel_files(tree), *engine_files(tree)], anywhere)


def mutants(tree: Path, files: Sequence[str], where: Callable[[ast.FunctionDef], bool]) -> list[Mutant]:
    """Those of some files."""
    return [mutant for file in files for mutant in find(file, (tree / file).read_text(), where)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the copies are removed
    sys.exit(main())
