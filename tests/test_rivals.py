"""Rivals beside us: every one that is installed computes what it is said to, and is timed and told as it should be."""

import json
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, NO
from depth import deep
from tiny import naive_sample, relative_error, tiny_dit
from torch import Tensor
from torch.nn import functional as F

from bench import targets
from bench.marks import seconds_between
from bench.report import rivals as told
from bench.report import tables
from bench.rivals import __main__ as command
from bench.rivals import limit, plain, race
from bench.rivals.case import Case
from bench.rivals.loop import Run, sample, step_on
from bench.rivals.rival import Rival
from bench.rivals.roster import OURS, RIVALS
from bench.rivals.switches import SWITCHES
from ebcache_fast.plan import Branch, Plan, StepType, layered
from ebcache_fast.samplers import make_sampler

TYPES = (NO, ATTN_MLP, ATTN_MLP, ATTENTION, NO, ATTN_MLP)


def case_of(types: Sequence[StepType] = TYPES, dtype: torch.dtype = torch.float64) -> Case:
    model = tiny_dit(0, dtype).requires_grad_(False)
    branches = Branch.SELF_ATTN, Branch.MLP
    plan = Plan.from_types(types, make_sampler("ddpm", len(types)).timesteps, layered(len(model.blocks), branches), 0.9)
    return Case(model, plan, 2)


def test_the_plain_forward_and_the_loop_are_the_method() -> None:
    case = case_of()
    reuse = [[(Branch.SELF_ATTN in kind.reuses, Branch.MLP in kind.reuses)] * 2 for kind in TYPES]
    expected = naive_sample(
        case.model,
        case.labels,
        case.noise,
        case.plan.timesteps,
        reuse,
        "ddpm",
        cfg_scale=case.cfg_scale,
        guided_channels=3,
        eps_scale=case.plan.eps_scale,
    )
    assert relative_error(plain.eager(case)().latents, expected) < 1e-12


def cases_of(*rivals: Rival) -> list[Any]:
    """Cases for these; those that compile, but one, are slow."""
    return [
        (deep if "compile" in rival.what and rival.name != "P3" else pytest.param)(rival, id=rival.name)
        for rival in rivals
    ]


@pytest.mark.parametrize("rival", cases_of(*RIVALS, *SWITCHES))
def test_every_rival_computes_the_method_again_and_again(rival: Rival) -> None:
    if rival.missing:
        pytest.skip(f"needs {', '.join(rival.missing)}")
    case = case_of(dtype=torch.float32)
    case = case if rival.is_cached else case.uncached()
    run = rival.make(case)
    first, second = run(), run()
    assert torch.equal(first.latents, second.latents)
    error = relative_error(first.latents, race.truth(case))
    assert rival.is_another or (1e-4 < error < 0.1 if rival.is_rounded else error < 1e-5)
    assert sum(first.steps or [1] * (len(first.marks) - 1)) == len(case.plan)
    assert first.host_seconds > 0


ANOTHER = [rival for rival in RIVALS if rival.is_another]


@pytest.mark.parametrize("rival", cases_of(*ANOTHER))
def test_another_method_without_reuse_is_the_model_and_with_it_near(rival: Rival) -> None:
    if rival.missing:
        pytest.skip(f"needs {', '.join(rival.missing)}")
    case = case_of(dtype=torch.float32)
    assert relative_error(rival.make(case.uncached())().latents, race.truth(case.uncached())) < 1e-5
    assert 5e-6 < relative_error(rival.make(case)().latents, race.truth(case.uncached())) < 3


@pytest.mark.parametrize("rival", cases_of(*ANOTHER))
def test_another_method_reuses_as_much_as_the_table(rival: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAB reuses attention alone, all others whole steps; what is counted is attention."""
    if rival.missing:
        pytest.skip(f"needs {', '.join(rival.missing)}")
    case = case_of([NO, NO, NO, NO, ATTN_MLP, NO, ATTENTION, ATTN_MLP, NO, NO], torch.float32)
    run, attend, attended = rival.make(case), F.scaled_dot_product_attention, list[None]()

    def counting(*args: Tensor, **options: Any) -> Tensor:
        attended.append(None)
        return attend(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    run()
    reused = 3 if rival.name == "P4, PAB" else 2
    computed_first_blocks = 2 if rival.name in ("P4", "P4, compiled", "P4, FirstBlockCache") else 0
    assert len(attended) == 2 * (len(case.plan) - reused) + computed_first_blocks


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_case_stays_as_it_was(compiles: bool) -> None:
    """Contenders share one model: none may leave anything on it."""
    case = case_of(dtype=torch.float32)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    for rival in RIVALS:
        if not rival.missing and ("compile" in rival.what) == compiles:
            rival.make(case if rival.is_cached else case.uncached())()
    assert "forward" not in vars(case.model)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def broken(case: Case) -> Any:
    raise RuntimeError("out of\nluck")


def wrong(case: Case) -> Any:
    return lambda: sample(case, lambda x, i: torch.cat([x, x], dim=1))


def ours(name: str) -> Rival:
    return next(rival for rival in RIVALS if rival.name == name)


def test_a_race_goes_on_without_whom_it_loses() -> None:
    said: list[str] = []
    rivals = [Rival("broken", "", broken), replace(ours(OURS), needs=("no_such_module",)), Rival("wrong", "", wrong)]
    entries = race.race(case_of(), [*rivals, ours("P1")], 2, said.append)
    lost, absent, bad, good = (entry.told() for entry in entries)
    assert (lost["why"], absent["why"]) == ("RuntimeError: out of", "needs no_such_module")
    assert bad["error"] > 0.1 > 1e-12 > good["error"]
    assert good["rounds"] == len(entries[-1].loops) == 2
    assert list(good["step_ms"]) == ["NO_CACHE", "ATTN_MLP", "ATTENTION"]
    assert len(said) == 4


def test_what_fails_later_or_finds_no_time_left_costs_nobody_else_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case, turns = case_of(), list[None]()

    def fails_later(case: Case) -> Any:
        run = plain.eager(case)

        def once() -> Run:
            turns.append(None)
            if len(turns) > 2:
                raise RuntimeError("out of luck")
            return run()

        return once

    late, good = race.race(case, [Rival("late", "", fails_later), ours("P1")], 3, lambda _: None)
    assert (late.why, good.why) == ("RuntimeError: out of luck", None)
    assert (len(turns), len(good.loops)) == (3, 3)
    (unprepared,) = race.race(case, [ours("P1")], 3, lambda _: None, seconds=0)
    assert unprepared.told()["why"] == "no time was left"
    monkeypatch.setattr(race, "PREPARING", float("inf"))
    (hurried,) = race.race(case, [ours("P1")], 5, lambda _: None, seconds=1e-9)
    assert hurried.told()["rounds"] == race.LEAST_ROUNDS


def test_an_error_that_costs_the_device_ends_the_race_and_leaves_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, turns, kept = case_of(), list[None](), list[int]()
    monkeypatch.setattr(race, "is_lost", lambda _: len(turns) > 4)

    def spoils_the_device(case: Case) -> Any:
        run = plain.eager(case)

        def once() -> Run:
            turns.append(None)
            if len(turns) > 4:  # after its first run, a warm-up and two rounds
                raise RuntimeError("an illegal memory access")
            return run()

        return once

    rivals = [ours("P1"), Rival("guilty", "", spoils_the_device), ours(OURS)]
    entries = race.race(case, rivals, 9, lambda _: None, keep=lambda now: kept.append(now[2].told()["rounds"]))
    assert [entry.why for entry in entries] == [None, "RuntimeError: an illegal memory access", None]
    assert [len(entry.loops) for entry in entries] == [3, 2, 2]
    assert kept == [2]
    turns.clear()
    turns += [None] * 2  # and now in the first round, of which no quartiles can be taken
    *_, innocent = race.race(case, rivals, 9, lambda _: None)
    assert "cost all of them their device" in innocent.told()["why"]


def test_who_takes_too_long_to_prepare_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = list[None]()

    def compiles_for_ever(case: Case) -> Any:
        with suppress(TimeoutError):  # as a compiler does that takes it for an error of its own
            tries.append(None)
            time.sleep(60)
        tries.append(None)
        time.sleep(60)

    monkeypatch.setattr(race, "PREPARING", 0.01)
    monkeypatch.setattr(limit, "AGAIN", 0.5)
    slow, late = race.race(case_of(), [Rival("slow", "", compiles_for_ever), ours("P1")], 2, lambda _: None, 100)
    assert (slow.why, late.why, len(tries)) == ("TimeoutError: no time was left", "no time was left", 2)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_what_is_prepared_for_a_run_counts_but_is_no_step() -> None:
    entry = race.Entry(RIVALS[0])
    race.note(entry, case_of(), Run(torch.zeros(1), [3.0, 10.0], 0.0, (6,), 1.0))
    race.note(entry, case_of([NO]), Run(torch.zeros(1), [3.0, 10.0], 0.0, (), 0.0))
    assert (entry.loops, entry.steps) == ([9, 10], {"NO_CACHE": [7.0]})
    run = ours(OURS).make(case_of())()
    assert run.began is not None
    assert seconds_between(run.began, run.marks[0]) > 0


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_precision_is_set_for_a_while(precision: str) -> None:
    def settings() -> tuple[str, ...]:
        backends: Any = torch.backends
        return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision

    before = settings()
    with pytest.raises(ZeroDivisionError), plain.float32_products(precision):  # noqa: PT012
        assert settings() == (precision, precision)
        raise ZeroDivisionError
    assert settings() == before
    assert torch.backends.cuda.matmul.allow_tf32 is False  # raises where the two ways to ask disagree


def test_steps_are_told_by_type_and_runs_apart() -> None:
    case = case_of()
    entry = race.Entry(RIVALS[0])
    race.note(entry, case, Run(torch.zeros(1), [0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0], 0.6))
    race.note(entry, case, Run(torch.zeros(1), [0.0, 1.0, 6.0, 10.0, 15.0, 21.0], 0.0, (1, 2, 1, 1, 1)))
    race.note(entry, case, Run(torch.zeros(1), [0.0, 8.0], 0.0, (6,)))
    assert entry.loops == [21, 21, 8]
    assert entry.hosts == pytest.approx([0.1, 0, 0])
    assert entry.steps == {
        "NO_CACHE": [3.0, 3.0],
        "ATTN_MLP": [3.0, 6.0],
        "ATTENTION": [4.0, 4.0],
        "run of 2 ATTN_MLP": [5.0],
    }


def test_what_our_own_loop_can_not_do_without() -> None:
    case = case_of(dtype=torch.float32)
    weights = sum(parameter.nbytes for parameter in case.model.parameters())
    slot = 4 * 4 * 16 * 4  # rows, tokens, width, bytes
    modulation = (3 * 2 * 2 + 2) * 6 * 3 * 16 * 4  # of two labels and none
    assert race.needed_bytes(case) == weights + 4 * slot + modulation + 7 * 2 * 4 * 8 * 8 * 4 + 10 * slot


def test_guidance_reaches_three_channels_and_b_all_four() -> None:
    case = case_of()
    x, noise = torch.zeros(2, 4, 8, 8).double(), torch.zeros(2, 4, 8, 8).double()
    row = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).double()
    out = torch.cat([torch.full((2, 8, 8, 8), 2.0), torch.full((2, 8, 8, 8), 1.0)]).double()
    moved: Tensor = step_on(case, x, out, row, noise)
    assert moved[:, :3].unique().tolist() == pytest.approx([0.9 * 2.5])  # 1 + 1.5 * (2 - 1)
    assert moved[:, 3].unique().tolist() == pytest.approx([0.9 * 2])


# ------------------------------------------------------------------------------- the command and what is told of it


@cache
def dry_run(folder: Path) -> dict[str, Any]:
    """Few contenders, tiny."""
    out = folder / "h200-rivals-released-256px-B1.json"
    only = [OURS, f"{OURS}, uncached", "P1", "P1, uncached"]
    assert command.main(["--dry-run", "--rounds", "2", "--out", str(out), "--only", *only]) == 0
    return dict(json.loads(out.read_text()))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    dry_run(folder)
    return folder


def test_a_dry_run_writes_all_that_is_told(results: Path) -> None:
    found = dry_run(results)
    assert found["dry_run"] is True
    assert [one["name"] for one in found["contenders"]] == [OURS, f"{OURS}, uncached", "P1", "P1, uncached"]
    assert all(one["error"] < 1e-5 for one in found["contenders"])
    assert found["telemetry"]["start"]["versions"]["torch"] == torch.__version__
    assert found["step_types"] == {"NO_CACHE": 3, "ATTN_MLP": 5}
    assert found["mac_limit"] > 1


def test_the_readme_is_made_from_it(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tables, "RESULTS", results)
    monkeypatch.setattr(told, "DOCS", results)
    text = told.rivals()
    assert "| P1: EB-Cache in plain torch, eager |" in text
    assert "not measured | - |" in text
    assert (results / "rivals.png").stat().st_size > 10_000


def test_without_results_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert told.rivals() == "Not measured yet."


def test_targets_are_judged_by_what_was_measured(tmp_path: Path) -> None:
    def contender(name: str, loop: float, **steps: float) -> dict[str, Any]:
        return {
            "name": name,
            "why": None,
            "loop_ms": {"median": loop},
            "step_ms": {kind: {"median": value} for kind, value in steps.items()},
            "host_us_a_step": {"median": 11.0},
            "peak_bytes": 115,
        }

    found = [contender(OURS, 40, NO_CACHE=1.0, ATTN_MLP=0.031), contender("P1", 180), contender("P3", 87)]
    lost = {"name": "P5", "why": "needs luck"}
    name = "h200-rivals-released-256px-B1.json"
    (tmp_path / name).write_text(json.dumps({"contenders": [*found, lost], "needed_bytes": 100}))
    assert targets.main(["--results", str(tmp_path)]) == 1
    judged = {one["name"]: one for one in json.loads((tmp_path / targets.OUT).read_text())["targets"]}
    assert len(judged) == len(targets.TARGETS)
    met = {name.removeprefix("256 px, B=1: "): one["met"] for name, one in judged.items() if one["met"] is not None}
    assert met == {
        "256 px, B=1, released table: a run": True,
        "P1 over ours": True,
        "P3 over ours": False,
        "ATTN_MLP": False,
        "ATTN_MLP over NO_CACHE": False,
        "host, a step of our own loop": False,
        "memory over what the run needs": True,
    }
    assert judged["256 px, B=1: P1 over ours"]["measured"] == 4.5


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert command.main([]) == 0
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(("roster", "expected"), [("rivals", RIVALS), ("switches", SWITCHES)])
def test_all_contenders_are_listed(roster: str, expected: Sequence[Rival], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--roster", roster]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(expected) == len({rival.name for rival in expected})


def test_of_one_round_there_are_no_quartiles(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--dry-run", "--rounds", "1"])
    assert "--rounds 1 is below 2" in capsys.readouterr().err


def test_who_does_not_compete_is_named() -> None:
    with pytest.raises(SystemExit, match=r"--only 'P7' is none of .*P5.*; --list says who they are"):
        command.main(["--dry-run", "--only", "P7"])
