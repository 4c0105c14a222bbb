"""Explanations of mutants that no test can kill, by where the mutant is and not by its line's number.

A line of the file: ``kernels/x.py::function | operator#number | the original line | why it changes nothing``.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.mutants.errors import MutationError
from bench.mutants.find import Mutant

SEPARATOR = " | "


def read_explanations(path: Path) -> dict[str, str]:
    """Reasons by `Mutant.key`; empty lines and those that begin with # say nothing."""
    reasons: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split(SEPARATOR)]
        key, reason = SEPARATOR.join(parts[:-1]), parts[-1]
        if len(parts) < 4 or not all(parts):
            raise MutationError(
                f"{path}:{number}: {line!r} is not file::function | operator#number | line | reason; "
                "take the first three as the table of survivors prints them"
            )
        if key in reasons:
            raise MutationError(f"{path}:{number}: {key!r} is explained twice; remove one")
        reasons[key] = reason
    return reasons


def stale(reasons: Mapping[str, str], mutants: Iterable[Mutant]) -> list[str]:
    """The keys among the explanations that no mutant has any more."""
    return sorted(reasons.keys() - {mutant.key for mutant in mutants})
