"""What docs/bundled_model.md says of moved tables, against the figures, and `CacheTable.retime` against the script."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from bench.report import letters
from bench.report.tables import DOCS, RESULTS
from bench.retime import POSITIONS, SPACINGS, STEPS, moved
from ebcache_fast.plan.table import CacheTable

ROWS: list[dict[str, Any]] = json.loads((RESULTS / "retime.json").read_text())["rows"]
ALIKE = [row for row in ROWS if row["from"][0] == row["to"][0]]
OTHERS = [row for row in ROWS if row not in ALIKE]


def test_positions_differ_only_where_steps_are_spaced_otherwise() -> None:
    assert all(row[name] == row["index"] for row in ALIKE for name in POSITIONS)
    differing = {name: mean(row[name]["differing"] / row["to"][1] for row in OTHERS) for name in POSITIONS}
    assert min(differing, key=lambda name: differing[name]) == "index"
    astray = {
        name: mean(abs(row[name]["mac_limit"] - row["calibrated"]["mac_limit"]) for row in OTHERS) for name in POSITIONS
    }
    assert min(astray, key=lambda name: astray[name]) == "index"


def test_a_moved_table_is_no_worse_on_average() -> None:
    for rows in (ALIKE, OTHERS):
        assert mean(row["index"]["error"] - row["calibrated"]["error"] for row in rows) < 0.01
    ratios = [row["index"]["error"] / row["calibrated"]["error"] for row in ROWS]
    assert 0.45 < min(ratios) < max(ratios) < 1.5


def test_the_page_has_these_figures() -> None:
    assert letters.retime() in Path(DOCS / "bundled_model.md").read_text()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
def test_tables_are_moved_as_the_best_of_the_positions(spacing: str, steps: int) -> None:
    table = CacheTable.named("letters-ddim-20-1.5x")
    timesteps = SPACINGS[spacing](steps)
    assert table.retime(timesteps).step_types == moved(table, timesteps, POSITIONS["index"]).step_types
