"""What a campaign found, as a table and as JSON."""

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench.mutants.campaign import Outcome, Result
from bench.mutants.explained import SEPARATOR
from bench.mutants.find import Mutant

COLUMNS = ("mutants", "killed", "timeout", "explained", "survived", "broken")


@dataclass(frozen=True)
class Report:
    """Results with the explanations that were on file, and which of those fit no mutant."""

    results: Sequence[Result]
    reasons: Mapping[str, str]
    stale: Sequence[str]

    @property
    def survivors(self) -> list[Result]:
        """What nobody killed or explained."""
        return [
            result
            for result in self.results
            if result.outcome is Outcome.SURVIVED and result.mutant.key not in self.reasons
        ]

    @property
    def broken(self) -> list[Result]:
        return [result for result in self.results if result.outcome is Outcome.BROKEN]

    @property
    def disproved(self) -> list[Result]:
        """Explained as equivalent, yet killed."""
        killed = (Outcome.KILLED, Outcome.TIMEOUT)
        return [result for result in self.results if result.outcome in killed and result.mutant.key in self.reasons]

    @property
    def passed(self) -> bool:
        return not (self.survivors or self.broken or self.disproved or self.stale)

    def verdict(self, result: Result) -> str:
        """The column of the table that a result counts in."""
        explained = result.outcome is Outcome.SURVIVED and result.mutant.key in self.reasons
        return "explained" if explained else result.outcome.value


def diff(mutant: Mutant) -> str:
    """A mutant with its line before and after."""
    return f"{mutant.id}\n  - {mutant.before}\n  + {mutant.after}"


def table(report: Report) -> str:
    """Counts by file and in all, then everything that needs a person."""
    counts = {result.mutant.file: Counter[str]() for result in report.results}
    for result in report.results:
        counts[result.mutant.file].update(("mutants", report.verdict(result)))
    counts["all"] = sum(counts.values(), Counter[str]())
    width = max(map(len, counts))
    rows = [f"{'':{width}}" + "".join(f"{name:>10}" for name in COLUMNS)]
    rows += [f"{file:{width}}" + "".join(f"{own[name]:10}" for name in COLUMNS) for file, own in counts.items()]
    rows += _section("survived: kill it by a better test, or explain it", map(_survivor, report.survivors))
    rows += _section("broken: pytest itself failed", (f"{diff(one.mutant)}\n{one.tail}" for one in report.broken))
    rows += _section(
        "explained as equivalent, but killed: remove the explanation",
        (f"{one.mutant.key}\n  by {one.by}" for one in report.disproved),
    )
    rows += _section("explained, but no such mutant: remove or mend the explanation", report.stale)
    return "\n".join(rows)


def _section(title: str, entries: Iterable[str]) -> list[str]:
    listed = list(entries)
    return [f"\n{title}", *listed] if listed else []


def _survivor(result: Result) -> str:
    return f"{diff(result.mutant)}\n  to explain: {result.mutant.key}{SEPARATOR}<reason>"


def write_json(report: Report, path: Path, **setting: object) -> None:
    """Every result, the counts by operator, and what ran it."""
    by_operator: dict[str, Counter[str]] = {}
    for result in report.results:
        by_operator.setdefault(result.mutant.operator, Counter()).update((report.verdict(result),))
    document = {
        "passed": report.passed,
        "setting": setting,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "triton")}},
        "stale": list(report.stale),
        "operators": {name: dict(own) for name, own in sorted(by_operator.items())},
        "mutants": [_row(report, result) for result in report.results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1))


def _row(report: Report, result: Result) -> dict[str, object]:
    mutant = result.mutant
    return {
        "id": mutant.id,
        "key": mutant.key,
        "before": mutant.before,
        "after": mutant.after,
        "verdict": report.verdict(result),
        "by": result.by,
        "seconds": round(result.seconds, 3),
        "reason": report.reasons.get(mutant.key),
    }
