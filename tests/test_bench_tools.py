"""The tools that measure kernels: telemetry, the work of a call, tuning, the suite for GPU machines."""

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from constants import CPU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import gpu_suite, telemetry, tune
from bench.kernel_cases import CALLS
from bench.kernel_contenders import CONTENDERS, EAGER, TINY, BoundCall, Judge, Work, bound, interleaved, work
from bench.kernel_operands import LETTERS, XL_256, KernelOperands, ModelSizes
from bench.step_cases import KINDS
from ebcache_fast.kernels import gated_residual, launch
from ebcache_fast.kernels.launch import ALL, Launch
from ebcache_fast.ops import reference

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

# ---------------------------------------------------------------------------------------------- telemetry


class FakeNvml(ModuleType):
    """A GPU that tells all but its power limit."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.running = False
        self.asked: list[object] = []

    def nvmlInit(self) -> None:  # noqa: N802
        self.running = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.running = False

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: object) -> int:  # noqa: N802
        raise self.NVMLError("Not Supported")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        answers = {
            "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetName": lambda gpu: f"a card at {gpu}",
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlDeviceGetClockInfo": lambda gpu, kind: 100 * kind,
            "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: 1000 * kind,
            "nvmlDeviceGetPowerUsage": lambda gpu: 123_456,
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 40 + sensor,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 0x804,
        }
        return answers[name]


def test_telemetry_without_nvml_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = json.loads(json.dumps(telemetry.telemetry()))
    assert found["gpu"]["available"] is False
    assert "nvidia-ml-py" in found["gpu"]["why"]
    assert found["versions"]["torch"] == torch.__version__
    assert {"triton", "python", "commit"} <= found["versions"].keys()


def test_telemetry_reads_the_gpu_and_lets_go_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert telemetry.gpu_state() == {
        "available": True,
        "name": "a card at gpu 0",
        "driver": "580.1",
        "sm_clock_mhz": 100,
        "sm_clock_max_mhz": 1000,
        "memory_clock_mhz": 200,
        "memory_clock_max_mhz": 2000,
        "power_watts": 123.456,
        "power_limit_watts": "not told: Not Supported",
        "temperature_celsius": 40,
        "throttle_reasons": ["software power cap", "0x800"],
    }
    assert not nvml.running


def test_telemetry_asks_for_the_gpu_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-{index}"))
    assert telemetry.gpu_state()["name"] == "a card at GPU-uuid-3"


def test_telemetry_outside_of_a_repository_has_the_commit_that_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for commit in (None, "0123abc"):
        monkeypatch.delenv("COMMIT", raising=False)
        if commit is not None:
            monkeypatch.setenv("COMMIT", commit)
        assert telemetry.versions()["commit"] == commit


# ---------------------------------------------------------------------------------------------- work

SMALL = ModelSizes("small", side=4, channels=3, patch=2, width=10, hidden=20, heads=2, slots=6)
# One sample, 2 bytes a channel. Counted by hand: 2 rows of 4 tokens of 10 channels are 160 bytes; a gate, shift or
# scale of 2 conditions is 40; latents are 3 * 4 * 4 * 4 = 192; a patch has 12 elements, so that the embedding's weight,
# bias and positions have 120 + 10 + 40 elements, 340 bytes, and the head's eps half 120 + 12, 264 bytes.
BY_HAND = {
    "residual": Work(4 * 160 + 2 * 40, 0),
    "residual, norm": Work(4 * 160 + 3 * 40, 0),
    "2 residuals, norm": Work(5 * 160 + 4 * 40, 0),
    "norm": Work(2 * 160 + 2 * 40, 0),
    "residual, norm, float8": Work(3 * 160 + 80 + 8 * 4 + 3 * 40, 0),
    "sum for 1 step": Work(8 * 160 + 6 * 40, 0),
    "sum for 2 steps": Work(8 * 160 + 12 * 40, 0),
    "sum for 3 steps": Work(9 * 160 + 18 * 40, 0),
    "embed": Work(192 + 340 + 160, 2 * 4 * 12 * 10),
    "embed, norm": Work(192 + 340 + 2 * 160 + 2 * 40, 2 * 4 * 12 * 10),
    "head": Work(2 * 160 + 3 * 40 + 528 + 2 * 2 * 192, 2 * 8 * 10 * 24),
    "head, DDPM": Work(2 * 160 + 3 * 40 + 528 + 3 * 192, 2 * 8 * 10 * 24),
    "head, DDIM": Work(2 * 160 + 3 * 40 + 264 + 2 * 192, 2 * 8 * 10 * 12),
    "head, DPM-Solver++": Work(2 * 160 + 3 * 40 + 264 + 4 * 192, 2 * 8 * 10 * 12),
    "run of 3 steps, DPM-Solver++": Work(3 * 160 + 6 * 40 + 340 + 264 + 4 * 192, 3 * (960 + 1920)),
    "run of 3 steps": Work(3 * 160 + 6 * 40 + 340 + 528 + 5 * 192, 3 * (960 + 3840)),
    "gather": Work(2 * 2 * 20 + 2 * 4, 0),
    "scatter": Work(2 * 2 * 20 + 2 * 4, 0),
    "linear, GELU": Work(160 + 320 + 2 * (200 + 20), 2 * 8 * 10 * 20),
    "attention": Work(3 * 160 + 160, 2 * 2 * (2 * 4 * 4 * 10)),
    "window attention": Work(3 * 160 + 160, 2 * 2 * (2 * (2 + 3 + 3 + 2) * 10)),  # 4 tokens, each sees its neighbours
}


# Of these the reference does more: without noise it makes the variance all the same, and in a window all scores.
BY_HAND_ALONE = ("head, DDIM", "head, DPM-Solver++", "run of 3 steps, DPM-Solver++", "window attention")


def test_work_is_what_was_counted_by_hand() -> None:
    assert {kernel: work(kernel, SMALL, 1, 2) for kernel in CALLS} == BY_HAND


def test_work_at_real_size() -> None:
    """A residual with its norm at DiT-XL/2, 256 px, B=1: 4 tensors of 512 x 1152 in 2 bytes and three tables."""
    assert work("residual, norm", XL_256, 1, 2) == Work(4 * 512 * 1152 * 2 + 3 * 2 * 1152 * 2, 0)


@pytest.mark.parametrize("kernel", [kernel for kernel in CALLS if kernel not in BY_HAND_ALONE])
def test_flops_are_those_that_torch_counts(kernel: str) -> None:
    call = bound(kernel, KernelOperands(LETTERS, 2, torch.float32, CPU))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know a CPU's flash
        getattr(reference, call.operation)(*call.arguments)
    assert counter.get_total_flops() == work(kernel, LETTERS, 2, 4).flops


# ---------------------------------------------------------------------------------------------- contenders


def test_a_bound_call_is_the_launchers_and_nothing_ran() -> None:
    operands = KernelOperands(TINY, 1, torch.float32, CPU)
    before = operands.h.clone()
    call = bound("residual", operands)
    assert call.operation == "gated_residual"
    assert call.arguments[0] is operands.h
    assert torch.equal(operands.h, before)
    CONTENDERS[EAGER](call.operation)(*call.arguments)
    assert not torch.equal(operands.h, before)


def test_contenders_take_turns() -> None:
    turns: list[str] = []

    def one(name: str) -> float:
        turns.append(name)
        return float(len(turns))

    assert interleaved(2, {"a": lambda: one("a"), "b": lambda: one("b")}) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}


def test_one_contender_that_can_not_run_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytest_benchmark")
    from bench import test_kernels

    def broken(operation: str) -> Any:
        raise RuntimeError("no such library")

    monkeypatch.setattr(test_kernels, "CONTENDERS", {**CONTENDERS, "flash": broken})
    monkeypatch.setattr(test_kernels, "DEVICE", CPU)
    outcomes = test_kernels.run_race(test_kernels.Case("norm", TINY, 1), ("flash", EAGER))
    assert str(outcomes["flash"]).startswith("RuntimeError: no such library")
    assert len(outcomes[EAGER]) == test_kernels.ROUNDS


def test_a_judge_knows_right_from_wrong_and_leaves_operands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    call = bound("norm", KernelOperands(TINY, 1, torch.float32, CPU))
    before = call.arguments[-1].clone()
    judge = Judge(call)

    def kernel(result: Callable[..., object]) -> None:
        def launcher(*arguments: Any, pdl: bool) -> None:
            result(*arguments)

        monkeypatch.setattr(gated_residual, "gated_residual_norm_modulate", launcher)

    kernel(reference.gated_residual_norm_modulate)
    assert judge.objection() is None
    assert torch.equal(call.arguments[-1], before)
    for wrong in (lambda *arguments: None, lambda *arguments: arguments[-1].fill_(float("nan"))):
        kernel(wrong)
        assert "wrong" in str(judge.objection())


# ---------------------------------------------------------------------------------------------- tuning

PRESENT, WRONG, RAISING, FAST = (Launch(rows, 0, 4) for rows in (1, 2, 4, 8))


def candidates_tried(monkeypatch: pytest.MonkeyPatch) -> list[tune.Trial]:
    """Four candidates of a kernel that computes wrongly with one, and in no time, and raises with another."""

    def kernel(*arguments: Any, pdl: bool) -> None:
        chosen = launch.parameters("gated_residual", 8, CPU)
        if chosen == RAISING:
            raise RuntimeError("out of shared memory\nmore")
        if chosen != WRONG:
            reference.gated_residual_norm_modulate(*arguments)

    def paced(run: Any, calls: list[BoundCall], device: torch.device) -> Any:
        return lambda: {PRESENT: 5.0, WRONG: 1.0, FAST: 3.0}[launch.parameters("gated_residual", 8, CPU)]

    monkeypatch.setattr(gated_residual, "gated_residual_norm_modulate", kernel)
    monkeypatch.setattr(tune, "timer", paced)
    search = tune.Search(("norm",), (PRESENT, WRONG, RAISING, FAST))
    return tune.try_all("gated_residual", search, tune.Size(TINY, 1, torch.float32, CPU), rounds=3)


def test_only_a_right_candidate_can_win(monkeypatch: pytest.MonkeyPatch) -> None:
    table = launch.TABLE
    trials = candidates_tried(monkeypatch)
    assert [trial.seconds for trial in trials] == [(5.0,) * 3, (), (), (3.0,) * 3]
    assert "gated_residual_norm_modulate is wrong by" in str(trials[1].rejected)
    assert trials[2].rejected == "RuntimeError: out of shared memory"
    won = tune.best(trials)
    assert won is not None
    assert won.launch == FAST
    assert tune.best(trials[1:3]) is None
    assert launch.TABLE is table


def test_noise_does_not_change_the_table() -> None:
    present, hardly, clearly = (tune.Trial(Launch(1, 0, 4), seconds=(seconds,)) for seconds in (1.0, 0.99, 0.9))
    assert tune.best([present, hardly]) is present
    assert tune.best([present, hardly, clearly]) is clearly


def test_an_entry_is_ready_for_the_table() -> None:
    a, b = Launch(1, 0, 4), Launch(4, 0, 8)
    line = tune.entry("gated_residual", [(512, a), (4096, a), (8192, b), (16384, b)], 90)
    assert eval(f"{{{line}}}", {"Launch": Launch, "ALL": ALL}) == {"gated_residual": {90: ((4096, a), (ALL, b))}}


def test_candidates_are_bounded_and_of_kernels_that_the_table_has() -> None:
    assert tune.SEARCHES.keys() == launch.TABLE.keys()
    assert all(4 <= len(search.candidates) <= 48 for search in tune.SEARCHES.values())


@NO_GPU
def test_tune_dry_run_checks_and_times_two_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "tune.json"
    assert tune.main(["--dry-run", "--kernel", "gated_sum", "--out", str(out)]) == 0
    assert "mean nothing" in capsys.readouterr().out
    (found,) = json.loads(out.read_text())["kernels"]
    (measured,) = found["measured"]
    assert [trial["rejected"] for trial in measured["trials"]] == [None, None]
    assert all(trial["seconds"] for trial in measured["trials"])
    assert found["entry"].startswith('"gated_sum": {90: ((ALL, Launch(')


@NO_GPU
def test_tune_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--out", str(tmp_path / "tune.json")]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- the suite


@NO_GPU
def test_suite_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path / "suite.json")]) == 0
    assert "no GPU: torch.cuda.is_available() is False" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_suite_dry_run_goes_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_suite.main(["--dry-run"]) == 0
    found = json.loads((tmp_path / "gpu-suite.json").read_text())
    stages = found["stages"]
    assert list(stages) == [stage.__name__ for stage, _ in gpu_suite.STAGES]
    assert {"start", "end"} == found["telemetry"].keys()
    assert stages["correctness"]["status"] == stages["memcheck"]["status"] == "passed", stages
    assert stages["correctness"]["found"]["tests"] >= 3
    assert stages["text_models"]["status"] in ("passed", "skipped"), stages
    if find_spec("pytest_benchmark") is None:
        assert "pytest-benchmark" in stages["benchmarks"]["why"]
        return
    assert stages["benchmarks"]["status"] == stages["compiled"]["status"] == "passed", stages
    assert [one["what"] for one in stages["steps"]["found"]["results"]] == [f"step: {kind}" for kind in KINDS]
    assert [one["what"] for one in stages["trajectories"]["found"]["results"]] == ["trajectory: mixed"]
    results = stages["benchmarks"]["found"]["results"]
    assert [one["kernel"] for one in results] == list(CALLS)
    assert all(one["median_us"] > 0 for one in results)


def test_suite_goes_on_after_a_stage_that_fails() -> None:
    def broken(seconds: float, dry: bool) -> gpu_suite.Outcome:
        raise OSError("no disk")

    def fine(seconds: float, dry: bool) -> gpu_suite.Outcome:
        return gpu_suite.Outcome("passed", found={"seconds": seconds})

    first, last = gpu_suite.attempt(broken, 1, dry=False), gpu_suite.attempt(fine, 0, dry=False)
    assert (first.status, first.why) == ("failed", "OSError: no disk")
    assert last.status == "out of time"
    kept: list[list[str]] = []
    found = gpu_suite.suite(
        ((fine, gpu_suite.GRACE), (broken, 100)), lambda found: kept.append([*found["stages"]]), dry=False
    )
    assert [found["stages"][name]["status"] for name in ("fine", "broken")] == ["out of time", "failed"]
    assert kept == [["fine"], ["fine", "broken"]]


def test_what_a_stage_leaves_of_its_time_is_the_next_ones() -> None:
    def fine(seconds: float, dry: bool) -> gpu_suite.Outcome:
        return gpu_suite.Outcome("passed", found={"seconds": seconds})

    last = gpu_suite.suite(((fine, 10_000), (fine, 5_000)), lambda _: None, dry=False)["stages"]["fine"]
    assert 12_000 < last["found"]["seconds"] <= 15_000 - gpu_suite.GRACE


def test_suite_is_over_in_nine_minutes() -> None:
    assert sum(seconds for _, seconds in gpu_suite.STAGES) + gpu_suite.GRACE < 540


def test_suite_keeps_what_a_command_said_that_failed_or_ran_out_of_time() -> None:
    failed = gpu_suite.run([sys.executable, "-c", "print('why'); raise SystemExit(3)"], math.inf)
    assert (failed.status, failed.why, failed.found) == ("failed", "exit status 3", {"output": "why\n"})
    assert gpu_suite.run([sys.executable, "-c", "import time; time.sleep(600)"], 0.5).status == "out of time"


def test_suite_names_the_wheels_that_are_missing() -> None:
    assert gpu_suite.missing("json") is None
    absent = gpu_suite.missing("json", "no_such_package")
    assert absent is not None
    assert (absent.status, absent.why.split(":")[0]) == ("skipped", "no no-such-package here")


def test_suite_counts_tests() -> None:
    report = ElementTree.ElementTree(
        ElementTree.fromstring(
            '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="a" name="x"/>'
            '<testcase classname="a" name="y"><failure message="wrong&#10;by far"/></testcase>'
            '<testcase classname="a" name="z"><skipped message="no flash"/></testcase></testsuite></testsuites>'
        )
    )
    assert gpu_suite.counts(report) == {
        "tests": 3,
        "failures": 1,
        "errors": 0,
        "skipped": 1,
        "not_passed": {"a::y": "failure: wrong", "a::z": "skipped: no flash"},
    }
