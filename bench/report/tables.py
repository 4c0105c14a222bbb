"""Committed results, and how they are told."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"


def read(name: str) -> Any:
    """One committed result."""
    return json.loads((RESULTS / name).read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(report: dict[str, Any]) -> str:
    """On what it was measured, in a line."""
    m = report["machine"]
    return f"{m['gpu'] or str(m['cpus']) + ' CPU cores, no GPU'}; torch {m['torch']}, Python {m['python']}"
