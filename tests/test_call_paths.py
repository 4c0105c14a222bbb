"""`bench.call_paths`: what counts as a function that a step passes through, and how much a step may be."""

import json
import sys
from pathlib import Path

import pytest

from bench import call_paths
from ebcache_fast.plan import Branch, Plan, StepType, layered

PLAN = Plan.from_types([StepType.NO_CACHE, StepType.ATTENTION], (9, 1), layered(2, (Branch.SELF_ATTN, Branch.MLP)))


def test_what_counts_is_ours_once_and_with_all_that_is_written_within_it() -> None:
    assert call_paths.passed_through(lambda: [len(PLAN) for _ in range(3)]) == [
        "ebcache_fast/plan/plan.py::Plan.__len__"
    ]
    assert call_paths.passed_through(lambda: json.dumps([1])) == []
    names = call_paths.passed_through(lambda: PLAN.steps[1].reused)
    assert all(name.count("<") == 0 for name in names)
    assert sys.getprofile() is None


def test_what_raises_leaves_no_profiler_behind() -> None:
    with pytest.raises(ZeroDivisionError):
        call_paths.passed_through(lambda: 1 / 0)
    assert sys.getprofile() is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "house.json"
    assert call_paths.main(["--list", "--out", str(out)]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    files = {path.resolve() for root in (call_paths.PACKAGE, call_paths.KERNELS) for path in root.rglob("*.py")}
    assert found["house"]["files"] == len(files)
    assert found["house"]["lines"] == sum(len(path.read_text().splitlines()) for path in files)
    eager, graph, default, in_order = found["steps"].values()
    assert f"our own loop, eager: {eager['functions']} functions in {eager['files']} files\n" in said
    for step in (eager, graph, default, in_order):
        assert step["functions"] == len(set(step["names"])) > 0
        assert step["files"] == len({name.partition("::")[0] for name in step["names"]})
        assert {f"    {name}" for name in step["names"]} <= set(said.splitlines())
    assert "ebcache_fast/engine/trajectory.py::Trajectory.advance" in eager["names"]
    assert len(graph["names"]) < len(eager["names"])
    where_it_is_loaded = {"ebcache_fast/engine/flags.py::_of_diffusers"}
    assert len({*default["names"]} - where_it_is_loaded) <= 22
    assert default["files"] <= 11
    for step in (default, in_order):
        assert "ebcache_fast/engine/trajectory.py::ForwardTrajectory.predict" in step["names"]
        assert not {name.partition("::")[0] for name in step["names"]} & {
            "ebcache_fast/engine/runner.py",
            "ebcache_fast/ops/operations.py",
        }
