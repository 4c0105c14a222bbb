"""`bench.against`: figures of two checkouts, paired by turns."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import against


def test_ratios_are_taken_turn_by_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The moment of each turn is in both, so that it is in no ratio."""
    moments = iter([1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0])

    def run(checkout: Path, script: str, rounds: int) -> dict[str, Any]:
        moment, slower = next(moments), 1.0 if checkout == against.ROOT else 4.0
        if script == "cpu_speedup":
            return {"methods": [{"name": "No cache", "median_seconds_a_batch": moment * slower * rounds}]}
        known = {"step_us": {"median": -1.0}, "step_us_with_known_fingerprint": {"median": 6 * moment * slower}}
        name = "drop-in" if slower == 1 else "drop-in, as it was called"
        return {"ways": {"own": {"step_us": {"median": 5 * moment}}, name: known}}

    monkeypatch.setattr(against, "_run", run)
    monkeypatch.setattr(against, "_git", lambda checkout, *words: str(checkout))
    out = tmp_path / "new" / "against.json"
    assert against.main([str(tmp_path), "--turns", "3", "--cpu-rounds", "7", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["against"], report["turns"]) == (str(tmp_path), 3)
    assert [(row["name"], row["ratio"], row["here"], row["there"]) for row in report["figures"]] == [
        ("host_cost 0: own", 1.0, 10.0, 10.0),
        ("host_cost 1: drop-in", 0.25, 12.0, 48.0),
        ("cpu_speedup 0: No cache", 0.25, 14.0, 56.0),
    ]
    assert all(row["quartiles"] == [row["ratio"]] * 2 for row in report["figures"])
    assert "host_cost 1: drop-in: 0.250 [0.250, 0.250] (12 against 48)" in capsys.readouterr().out
