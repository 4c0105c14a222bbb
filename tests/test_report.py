"""A comparison's report: what others need to repeat it, and to judge it by statistics of their own."""

import json
import shlex
import statistics
from pathlib import Path
from typing import NoReturn

import numpy
import pytest
import torch
from tiny import CLASSES, tiny_dit

from ebcache_fast.apps import report
from ebcache_fast.apps.cli.parser import parse
from ebcache_fast.apps.compare import Method, Result, measure
from ebcache_fast.apps.report import command_line, machine, write_report
from ebcache_fast.errors import JobError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan, StepType

MODEL = tiny_dit(dtype=torch.float32)
SHAPE = as_denoiser(MODEL).shape
LABELS = [i % CLASSES for i in range(5)]


def results() -> list[Result]:
    full, reused = StepType.NO_CACHE, StepType.ATTN_MLP
    kinds = (full, full, full), (full, reused, full)
    plans = [Plan.from_types(types, (900, 500, 0), SHAPE.sites) for types in kinds]
    methods = [Method(name, plan, "ddim") for name, plan in zip(("none", "reused"), plans, strict=True)]
    return measure(MODEL, methods, LABELS, seed=4, batch_size=2)[1]


def test_a_report_holds_all_that_the_figures_come_from(tmp_path: Path) -> None:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    path = tmp_path / "report.json"
    write_report(path, results(), LABELS, "as typed", {"seed": 4, "cfg_scale": 1.5})
    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found.items() >= {"seed": 4, "cfg_scale": 1.5, "labels": LABELS, "command": "as typed"}.items()
    for entry in found["methods"]:
        assert entry.items() >= {"sampler": "ddim", "timesteps": [900, 500, 0], "noise": "same"}.items()
        assert len(entry["batch_seconds"]) == 3
        errors = entry["per_sample"]["paired_error"]
        assert statistics.fmean(errors) == pytest.approx(entry["paired_error"])
        assert statistics.stdev(errors) / 5**0.5 == pytest.approx(entry["spread"]["paired_error"])
    assert found["methods"][1]["paired_error"] > 0


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"report\.json: can't be written"):
        write_report(tmp_path / "missing" / "report.json", results(), LABELS, "", {})
    assert list(tmp_path.iterdir()) == []


def test_the_machine_says_its_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = machine()
    assert found.items() >= {"torch": torch.__version__, "numpy": numpy.__version__}.items()
    assert found.keys() >= {"triton", "python", "ebcache_fast", "platform", "gpu", "operations"}
    assert found["cpu"]
    monkeypatch.setattr(report, "CPUINFO", tmp_path / "none")
    assert machine()["cpu"]
    assert report._version("no-such-package-of-anybody") is None


@pytest.mark.parametrize(
    "typed",
    [
        "compare --methods no-cache fora:2 'mine and yours.py:f' --samples 40 --labels 3 1 --out 'a b'",
        "profile --eager --no-trace --cfg-scale 4.0 --table x.json",
    ],
)
def test_a_command_line_means_the_same_call(typed: str) -> None:
    call = parse(shlex.split(typed))
    options = call.keywords  # type: ignore[attr-defined]
    words = shlex.split(command_line(shlex.split(typed)[0], options))
    assert parse(words[1:]).keywords == options  # type: ignore[attr-defined]
