"""The script that measures float8's error, on few samples, and what the README says of it."""

import json
import sys
from pathlib import Path

import pytest

from bench import float8_accuracy
from bench.report import letters, tables


def test_it_holds_every_way_against_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "float8-accuracy.json"
    monkeypatch.setattr(sys, "argv", ["float8_accuracy", "--samples", "3", "--steps", "4", "--out", str(out)])
    float8_accuracy.main()
    exact, float8, half, both = json.loads(out.read_text())["ways"]
    assert (exact["eps_error"], exact["picture_error"]) == ([], 0)
    assert [way["products"].partition(",")[0] for way in (exact, float8, half, both)] == [
        "nothing: fp8=False",
        "float8",
        "nothing: fp8=False",
        "float8",
    ]
    for way in (float8, half, both):
        assert len(way["eps_error"]) == 4
        assert 1e-3 < way["eps_error"][0] < 0.05
        assert 1e-4 < way["picture_error"] < 0.5
    assert max(float8["eps_error"][0], half["eps_error"][0]) < both["eps_error"][0]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert f"| bfloat16, FP8 products | {100 * both['eps_error_median']:.2f}% |" in letters.float8()
