"""The main job on a handful of steps: its report, its picture, and what it refuses before any work."""

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from ebcache_fast.apps import compare, demo, pictures
from ebcache_fast.apps.bundled import LETTERS, Preset, load_letters
from ebcache_fast.apps.compare import Method, Result, Run, equal_cost_methods
from ebcache_fast.apps.quality import Scores
from ebcache_fast.errors import InputError, JobError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan.table import CacheTable

SAMPLES = 32
DEMO_METHODS = demo.demo_methods  # the real one, before the short one takes its place
TABLE = CacheTable([999, 666, 333, 0], [0, 0, 2, 0])
KEYS = {
    "name",
    "step_types",
    "macs",
    "seconds",
    "speedup",
    "mac_limit",
    "fd_semantic",
    "fd_texture",
    "recognised",
    "n",
    "spread",
}


@cache
def letters(device: object = None) -> Preset:
    """The bundled model, held against fewer real pictures: that is what judging spends its time on."""
    preset = load_letters()
    few = dataclasses.replace(preset.reference, real_semantic=preset.reference.real_semantic[:40])
    return dataclasses.replace(preset, reference=few)


def few_steps(preset: Preset, sampler: str = "ddim") -> list[Method]:
    shape = as_denoiser(preset.model).shape
    return equal_cost_methods(shape, [("EB-Cache", TABLE.plan(shape))], sampler)


def never(*_: object, **__: object) -> NoReturn:
    raise AssertionError("this must not be reached")


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished demo: its folder, what it returned, and what it told of its progress."""

    out: Path
    results: list[Result]
    announced: list[int]
    advanced: list[int]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def a_short_demo() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_letters", letters)
        patch.setattr(demo, "demo_methods", few_steps)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("demo") / "new"
    announced: list[int] = []
    advanced: list[int] = []
    results = demo.demo(out, None, SAMPLES, seed=3, on_start=announced.append, on_step=advanced.append)
    return Done(out, results, announced, advanced)


# ------------------------------------------------------------------------------------------------ the report


def test_both_files_stand_directly_in_out(done: Done) -> None:
    assert sorted(path.name for path in done.out.iterdir()) == ["comparison.png", "report.json"]


def test_the_report_is_strict_json(done: Done) -> None:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((done.out / "report.json").read_text(), parse_constant=refuse)
    assert report.keys() >= {
        "methods",
        "seed",
        "sampler",
        "cfg_scale",
        "model",
        "labels",
        "command",
        "machine",
        "units",
    }
    assert report["seed"] == 3
    assert report["labels"] == [i % 26 for i in range(SAMPLES)]
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["torch_threads"] == torch.get_num_threads()


def test_every_method_has_every_figure(done: Done) -> None:
    assert len(done.report["methods"]) == 4
    for entry in done.report["methods"]:
        assert entry.keys() >= KEYS
        assert entry["n"] == SAMPLES
        assert 0 <= entry["recognised"] <= 1
        assert all(math.isfinite(entry[name]) and entry[name] >= 0 for name in ("fd_semantic", "fd_texture"))
        assert entry["seconds"] > 0


def test_costs_in_the_report_are_those_of_the_plans(done: Done) -> None:
    shape = as_denoiser(letters().model).shape
    methods = few_steps(letters())
    first = methods[0].plan.macs(shape)
    for entry, method in zip(done.report["methods"], methods, strict=True):
        assert entry["name"] == method.name
        assert entry["step_types"] == [step.step_type.name for step in method.plan.steps if step.step_type is not None]
        assert entry["macs"] == method.plan.macs(shape)
        assert entry["mac_limit"] == pytest.approx(first / entry["macs"])
    base, cached, *_ = done.report["methods"]
    assert (base["mac_limit"], base["speedup"], base["paired_error"]) == (1, 1, 0)
    assert cached["mac_limit"] == pytest.approx(TABLE.plan(shape).mac_limit(shape))
    assert cached["paired_error"] > 0


def test_every_spread_says_what_it_is_of(done: Done) -> None:
    for entry in done.report["methods"]:
        spread = entry["spread"]
        assert spread.keys() >= {"fd_semantic", "fd_texture", "recognised", "paired_error"}
        assert all(math.isfinite(value) and value >= 0 for value in spread.values())
        assert spread["fd_semantic"] > 0
        assert spread["speedup_low"] <= entry["speedup"] <= spread["speedup_high"]


def test_the_report_says_what_was_returned(done: Done) -> None:
    assert [entry["name"] for entry in done.report["methods"]] == [result.name for result in done.results]
    assert [entry["fd_semantic"] for entry in done.report["methods"]] == [r.scores.fd_semantic for r in done.results]


def test_progress_is_announced_and_kept(done: Done) -> None:
    (announced,) = done.announced
    assert announced == SAMPLES * sum(len(method.plan) for method in few_steps(letters()))
    assert sum(done.advanced) == announced


# ----------------------------------------------------------------------------------------------- the picture


def test_the_picture_can_be_looked_at(done: Done) -> None:
    with Image.open(done.out / "comparison.png") as picture:
        picture.load()
    assert picture.format == "PNG"
    assert 26 * 24 < picture.width < 3000  # a row holds the alphabet
    assert 4 * 24 < picture.height < 4000
    pixels = np.asarray(picture.convert("RGB"))
    for colour in ("#1f4e79", "#9fd3c7"):  # the strips' NO_CACHE and ATTN_MLP
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert (pixels == (red, green, blue)).all(axis=2).sum() > 100


def result(name: str, n: int) -> Result:
    scores = Scores(1.0, 1.0, 1.0, 0.975, 1.0, 1.0, 1.0, n)
    types = ("NO_CACHE", "ATTN_MLP")
    return Result(name, types, 1.0, 2, 1.25, 1.0, 1.5, 0.0, scores, {}, "ddim", (9, 0), "same", (1.0,), {})


@pytest.mark.parametrize(
    ("shown", "n", "columns", "images"),
    [(26, 156, 26, 52), (26, 40, 26, 40), (5, 156, 5, 5), (1, 156, 1, 1), (30, 156, 26, 52), (60, 156, 26, 52)],
)
def test_how_many_samples_are_drawn(
    shown: int, n: int, columns: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, list[pictures.Row]]] = []
    monkeypatch.setattr(pictures, "comparison", lambda title, sub, rows, columns, scale: drawn.append((columns, rows)))
    run = Run(torch.zeros(n, 3, 24, 24), (1.0,))
    demo.draw_comparison([result("a", n), result("b", n)], [run, run], shown)
    ((found, rows),) = drawn
    assert found == columns
    assert [len(row.images) for row in rows] == [images] * 2
    assert [row.name for row in rows] == ["a", "b"]
    assert rows[0].note == f"1.50x measured, 1.25x by MACs, error 0.000, 97.5% of {n} recognised"


@pytest.mark.parametrize("shown", [1, 5, 26])
def test_every_text_makes_a_picture_of_sensible_size(shown: int) -> None:
    run = Run(torch.zeros(64, 3, 24, 24), (1.0,))
    picture = demo.draw_comparison([result("a", 64)] * 7, [run] * 7, shown)
    assert 400 < picture.width < 2000
    assert 400 < picture.height < 3000


def test_a_text_is_what_is_drawn_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HELLO: five columns, and the samples in them are of its letters, the rest of the alphabet in turn."""
    labels: list[list[int]] = []
    columns: list[int] = []

    def run_methods(model: object, methods: list[Method], y: torch.Tensor, **given: object) -> list[Run]:
        labels.append(y.tolist())
        return [Run(torch.rand(len(y), 3, 24, 24) * 2 - 1, (1.0,)) for _ in methods]

    def grid(images: torch.Tensor, across: int, scale: int = 2) -> Image.Image:
        assert len(images) == 5
        columns.append(across)
        return Image.new("RGB", (300, 100))

    monkeypatch.setattr(compare, "run_methods", run_methods)
    monkeypatch.setattr(pictures, "grid", grid)
    demo.demo(tmp_path, "Hello", SAMPLES)
    (drawn,) = labels
    assert "".join(LETTERS[label] for label in drawn) == "HELLO" + LETTERS + "A"
    assert columns == [5] * 4


def test_a_long_text_is_sampled_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(
        demo, "measure", lambda model, methods, labels, judge, **_: counts.append(len(labels)) or ([], [])
    )
    monkeypatch.setattr(demo, "draw_comparison", lambda results, runs, shown: Image.new("RGB", (1, 1)))
    demo.demo(tmp_path, "A" * 40, SAMPLES)
    assert counts == [40]


# --------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 20), ("ddpm", 50)])
def test_the_methods_of_the_real_demo(sampler: str, steps: int) -> None:
    """At about 1.5x and 2.5x the path search, and all else at its cost."""
    shape = as_denoiser(letters().model).shape
    base, *others = DEMO_METHODS(letters(), sampler)
    assert (base.name, len(base.plan), base.plan.mac_limit(shape)) == (f"No cache, {steps} steps", steps, 1)
    count = 6 if sampler == "ddim" else 5
    assert len(others) == 2 * count
    assert {method.sampler for method in others if "DPM" not in method.name} == {sampler}
    for some, about in zip((others[:count], others[count:]), (1.5, 2.5), strict=True):
        path, voted, fora, taylor, fewer, *solver = some
        assert (path.name, voted.name) == (f"Path search, about {about}x", f"EB-Cache, about {about}x")
        assert [method.sampler for method in solver] == ["dpm-solver++"] * (sampler == "ddim")
        costs = [base.plan.macs(shape) / method.plan.macs(shape) for method in some]
        assert costs == pytest.approx([about] * count, rel=0.1)
        assert max(costs) < 1.06 * min(costs)
        assert fora.plan.macs(shape) == path.plan.macs(shape) == taylor.plan.macs(shape)
        assert len(fewer.plan) == sum(bool(step.computed) for step in path.plan.steps)


def test_by_default_all_go_towards_the_same_picture(done: Done) -> None:
    """Whoever draws noise at each of its steps is another picture with fewer of them, and its error says nothing."""
    base, cached, fora, fewer = done.results
    assert (base.noise, cached.noise, fora.noise, fewer.noise) == ("same", "same", "same", "other steps")
    assert done.report["sampler"] == "ddim"
    assert DEMO_METHODS(letters())[0].sampler == "ddim"
    assert 0 < fewer.paired_error < 0.9  # of unrelated pictures it is above 1


def test_the_papers_sampler_can_be_asked_for(tmp_path: Path) -> None:
    results = demo.demo(tmp_path, None, SAMPLES, sampler="ddpm")
    assert [result.noise for result in results] == ["same", "same", "same", "other noise"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sampler"] == "ddpm"
    assert "--sampler ddpm" in report["command"]
    assert demo._note(results[-1]).count("(other noise)") == 1


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "samples", "problem"),
    [
        ("A1", 156, "text 'A1' must be letters A to Z alone"),
        ("", 156, "text '' is empty"),
        (None, 31, "samples=31 is below 32"),
        (None, -5, "samples=-5 is below 32"),
        ("A" * 40, 5, "samples=5 is below 32"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    text: str | None, samples: int, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "load_letters", never)
    with pytest.raises(InputError, match=problem):
        demo.demo(tmp_path / "out", text, samples)
    assert list(tmp_path.iterdir()) == []


def test_a_sampler_without_tables_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load_letters", never)
    with pytest.raises(InputError, match=r"sampler='dpm-solver.*' has no tables .*; choose ddim or ddpm"):
        demo.demo(tmp_path / "out", sampler="dpm-solver++")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load_letters", never)
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="file can't be made"):
        demo.demo(tmp_path / "file")


def test_a_failed_run_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo.demo(tmp_path, None, SAMPLES)
    assert list(tmp_path.iterdir()) == []
