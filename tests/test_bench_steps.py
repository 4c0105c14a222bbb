"""The tools that measure steps: their cases and floors, the host's cost, the count of launches."""

import json
from pathlib import Path

import pytest
import torch
from constants import ATTN_MLP, CPU, NO
from tiny import tiny_dit

from bench import host_cost, launches, step_cases
from bench.ceilings import Ceilings
from bench.kernel_contenders import Work
from bench.launch_count import Launches
from bench.report import engine as told
from bench.report import tables
from ebcache_fast.engine.module_watch import ModuleState, Watch
from ebcache_fast.engine.step_scheduler import StepScheduler
from ebcache_fast.models import DiTDenoiser

# ---------------------------------------------------------------------------------------- steps and trajectories


def test_the_released_table_has_the_steps_that_it_is_known_for() -> None:
    plan = step_cases.plan_of("released table", DiTDenoiser(tiny_dit()).shape)
    assert plan.counts() == {NO: 34, ATTN_MLP: 16}
    assert sum(plan.steps[start].computes_nothing for start, _ in plan.runs()) == 12


def test_a_run_of_steps_has_every_kind_often() -> None:
    plan = step_cases.plan_of("steps", DiTDenoiser(tiny_dit()).shape)
    kinds = [step_cases.kind_of(dispatch) for dispatch in StepScheduler(plan).dispatches()]
    assert {kind: kinds.count(kind) >= 6 for kind in step_cases.KINDS} == dict.fromkeys(kinds, True)


def test_work_is_what_was_counted_by_hand() -> None:
    """One sample in 2 rows of 4 tokens of 16 channels, 2 bytes each: a slot has 256 bytes, and two layers have 4.

    A patch has 64 latents in and 128 features out: 192 * 16 = 3072 weights at both ends. A layer's attention has 1024
    weights and, for 4 tokens, 4608 multiply-adds a row, its MLP 2048 and 8192.
    """
    shape = DiTDenoiser(tiny_dit()).shape
    plan = step_cases.plan_of("steps", shape)
    works = {
        step_cases.kind_of(each): step_cases.work_of(each, plan, shape, rows=2, itemsize=2)
        for each in StepScheduler(plan).dispatches()
    }
    ends = 4 * 3072
    assert works == {
        "NO_CACHE": Work(2 * (3072 + 2 * 3072) + 4 * 256, 4 * (ends + 2 * (4608 + 8192))),
        "ATTENTION": Work(2 * (3072 + 2 * 2048) + 4 * 256, 4 * (ends + 2 * 8192)),
        "ATTN_MLP": Work(2 * 3072 + 4 * 256, 4 * ends),
        "run of 3 ATTN_MLP": Work(2 * 3072 + 4 * 256, 3 * 4 * ends),
    }


@pytest.mark.parametrize("table", ["steps", "mixed"])
def test_a_race_times_every_contender_and_kind(table: str) -> None:
    ceilings = Ceilings(bytes_per_second=1e9, flops_per_second=1e9)
    size = step_cases.Size("tiny", 0, 1)
    outcome = step_cases.race(table, size, tiny_dit(dtype=torch.float32), (step_cases.EAGER,), ceilings, 0.0, 9)
    assert list(outcome) == [("eager", kind) for kind in (step_cases.KINDS if table == "steps" else ("mixed",))]
    for measured in outcome.values():
        assert len(measured.seconds) == 3
        assert min(measured.seconds) > 0
        assert measured.floor > 0
        assert all(whole > loop for whole, loop in zip(measured.whole, measured.seconds, strict=False))


def test_graphs_compete_where_there_is_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert step_cases.contenders_of("steps", CPU) == ("eager",)
    assert step_cases.contenders_of("steps", gpu) == ("eager", "a graph a step type")
    assert step_cases.contenders_of("mixed", gpu) == ("eager", "a graph a step type", "one graph")


def test_rounds_fit_in_the_budget() -> None:
    assert [step_cases.rounds_for(seconds, 2.0, 15) for seconds in (0.001, 0.5, 9.0)] == [15, 4, 3]


# ---------------------------------------------------------------------------------------------- the host's cost


def test_the_fingerprint_is_subtracted_and_rounds_are_told_by_their_medians() -> None:
    step = host_cost.Step
    rounds = [[step(9e-6, 5e-6), step(7e-6, 5e-6), step(8e-6, 5e-6)], [step(15e-6, 5e-6)], [step(25e-6, 5e-6)]]
    found = host_cost.figures(rounds, [[step(1e-6)]] * 3)
    assert {name: pytest.approx(figure["median"]) for name, figure in found.items()} == {
        "step_us": 10.0,
        "fingerprint_us": 5.0,
        "step_us_with_known_fingerprint": 1.0,
    }
    assert found["step_us"]["least"] == pytest.approx(3.0)


def test_host_cost_of_few_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Watch] = []

    class NotedWatch(host_cost.TimedWatch):
        def look(self) -> ModuleState:
            looks.append(self)
            return super().look()

    monkeypatch.setattr(host_cost, "LAYERS", 1)
    monkeypatch.setattr(host_cost, "TimedWatch", NotedWatch)
    assert host_cost.main(["--rounds", "2", "--out", str(tmp_path / "cost.json")]) == 0
    looked = 3 * host_cost.STEPS + 1  # in two rounds, the one before them, and when it was enabled
    assert len(looks) == 2 * looked  # of two drop-ins
    found = json.loads((tmp_path / "cost.json").read_text())
    assert list(found["ways"]) == [host_cost.OWN_LOOP, host_cost.DEFAULT, host_cost.IN_ORDER]
    assert all(figure["median"] > 0 for way in found["ways"].values() for figure in way.values())
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "cost.json").rename(tmp_path / "host-cost.json")
    assert "| our own loop |" in told.host_cost()


def test_empty_graphs_run_nothing() -> None:
    ran: list[int] = []
    host_cost.EmptyGraphs(CPU).capture(lambda: ran.append(1), ()).replay()
    assert not ran


# --------------------------------------------------------------------------------------------------- launches


def test_views_are_no_launches() -> None:
    with Launches() as counted:
        torch.ones(4).view(2, 2).t().add(1)
    assert dict(counted.counts) == {"aten.ones.default": 1, "aten.add.Tensor": 1}


def test_launches_of_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launches.main(["--layers", "1", "--out", str(tmp_path / "launches.json")]) == 0
    found = json.loads((tmp_path / "launches.json").read_text())
    after = {name: counted["launches"] for name, counted in found["after"].items()}
    assert after == {"NO_CACHE": 8, "ATTENTION": 5, "ATTN_MLP": 2, "a run of 3 ATTN_MLP": 2}
    assert found["before"]["forward"]["launches"] > after["NO_CACHE"] + after["ATTENTION"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| NO_CACHE | 8 |" in told.launches()
