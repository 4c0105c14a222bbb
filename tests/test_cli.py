"""Every command as it is typed: what it writes and prints, and one clear line for every bad input."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pytest
import torch
from constants import ATTENTION, ATTN_MLP, MLP, NO, ROOT
from PIL import Image
from tiny import CLASSES, SIZES, tiny_dit

from ebcache_fast._version import __version__
from ebcache_fast.apps import bundled as presets
from ebcache_fast.apps import cli, compare, console, demo
from ebcache_fast.apps import jobs as job
from ebcache_fast.apps.bundled import Preset, load_letters
from ebcache_fast.apps.compare import Method
from ebcache_fast.apps.method_spec import Setting, parse_method
from ebcache_fast.apps.pictures import to_pixels
from ebcache_fast.models import DiT, as_denoiser
from ebcache_fast.plan import StepType
from ebcache_fast.plan.table import CacheTable, SamplerSpec, named_tables
from ebcache_fast.plan.table_set import TableSet
from ebcache_fast.policies import fora
from ebcache_fast.samplers import SAMPLERS
from ebcache_fast.sampling import sample

LETTERS_50 = "letters-ddpm-50-1.5x"
TINY = "DiT-tiny"
MODELS: Mapping[str, Callable[..., DiT]] = {TINY: partial(DiT, **SIZES)}
USE_TINY = f"--model {TINY} --image-size 64 --num-classes {CLASSES}"


class Outcome(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str


Run = Callable[[str], Outcome]


@cache
def letters(device: object = None) -> Preset:
    """The bundled model, held against fewer real pictures: that is what judging spends its time on."""
    preset = load_letters()
    few = dataclasses.replace(preset.reference, real_semantic=preset.reference.real_semantic[:40])
    return dataclasses.replace(preset, reference=few)


def two_methods(preset: Preset, sampler: str) -> list[Method]:
    setting = Setting(as_denoiser(preset.model).shape, 3, sampler)
    return [parse_method(text, setting) for text in ("no-cache", "fora:2")]


@pytest.fixture(scope="module", autouse=True)
def quick_parts() -> Iterator[None]:
    """The bundled model loaded once, the demo cut short, and a tiny model among the originals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "load_letters", letters)
        patch.setattr(demo, "load_letters", letters)
        patch.setattr(demo, "demo_methods", two_methods)
        patch.setattr(presets, "DIT_MODELS", MODELS)
        yield


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def once(line: str) -> Outcome:
        code = cli.main(line.split())
        return Outcome(code, *capsys.readouterr())

    return once


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if not path.is_dir())


def contents() -> dict[str, bytes]:
    return {name: Path(name).read_bytes() for name in files()}


def arr_0(path: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as found:
        return found["arr_0"]


# ---------------------------------------------------------------------------------------------- the commands


def test_demo(run: Run) -> None:
    code, out, err = run("demo --samples 32 --seed 2")
    assert (code, err) == (0, "")
    assert files() == ["ebcache-demo/comparison.png", "ebcache-demo/report.json"]
    assert out.splitlines()[-2:] == files()
    assert "32 samples a method" in out
    report = json.loads(Path("ebcache-demo/report.json").read_text())
    assert report["seed"] == 2
    for entry in report["methods"]:
        row = next(line for line in out.splitlines() if entry["name"] in line)
        for figure in (f"{entry['macs'] / 1e9:.2f}", f"{entry['mac_limit']:.2f}x", f"{entry['recognised']:.1%}"):
            assert figure in row
    assert "2 NO + 1 A+M" in out


def test_demo_with_a_text(run: Run) -> None:
    code, out, _ = run("demo --text hi --out there --samples 32")
    assert code == 0
    assert files() == ["there/comparison.png", "there/report.json"]
    assert "there/report.json" in out


def test_sample_draws_every_letter_in_turn(run: Run) -> None:
    code, out, err = run("sample --num-samples 28 --num-sampling-steps 2 --cfg-scale 1 --sampler ddim --global-seed 9")
    assert (code, err) == (0, "")
    assert out.splitlines() == files() == ["samples/samples.npz", "samples/samples.png"]
    labels = [*range(26), 0, 1]
    expected = sample(letters().model, labels, steps=2, cfg_scale=1.0, sampler="ddim", seed=9)
    assert np.array_equal(arr_0("samples/samples.npz"), to_pixels(expected).numpy())


def test_sample_a_text_with_a_named_table(run: Run) -> None:
    code, _, _ = run(f"sample --text Ab --table {LETTERS_50} --sample-dir there")
    assert code == 0
    table = CacheTable.named(LETTERS_50)
    expected = sample(letters().model, [0, 1], table=table)
    assert np.array_equal(arr_0("there/samples.npz"), to_pixels(expected).numpy())
    with Image.open("there/samples.png") as sheet:
        assert sheet.width > sheet.height


def test_sample_an_original_with_a_table_of_one_s_own(run: Run, tmp_path: Path) -> None:
    trained = tiny_dit(3, torch.float32)
    torch.save({"ema": trained.state_dict()}, tmp_path / "tiny.pt")
    table = CacheTable([999, 400, 0], [NO, ATTN_MLP, ATTENTION])
    table.save(tmp_path / "mine.json")
    code, out, _ = run(f"sample {USE_TINY} --ckpt tiny.pt --table mine.json --num-samples 7 --eps-scale 0.9")
    assert (code, out) == (0, "samples/samples.npz\n")  # latents are no picture
    expected = sample(trained, [0, 1, 2, 3, 4, 0, 1], table=table, eps_scale=0.9)
    assert np.array_equal(arr_0("samples/samples.npz"), expected.numpy())


def test_calibrate_then_use_the_table(run: Run) -> None:
    code, out, err = run(
        "calibrate --out new/t.json --samples 4 --num-sampling-steps 4 --sampler ddim --a 0.4 --k 0.4 --max-run 0"
        " --criterion norm --progress-file progress.json"
    )
    assert (code, err) == (0, "")
    assert files() == ["new/t.json", "progress.json"]
    table = CacheTable.load("new/t.json")
    assert table.sampler == SamplerSpec(name="ddim", steps=4, train_steps=1000)
    assert table.model == tuple(sorted(as_denoiser(letters().model).shape.sizes))
    assert table.made is not None
    assert table.made.options.items() >= {"a": 0.4, "k": 0.4, "max_run": None, "criterion": "norm"}.items()
    assert sum(table.made.votes["NO_CACHE"]) <= 4 * 4
    assert out.splitlines()[-1] == "new/t.json"
    assert "4 steps, timesteps 999 to 0" in out
    assert run("sample --table new/t.json --num-samples 1").code == 0
    code, _, err = run("calibrate --out new/t.json --samples 3 --num-sampling-steps 4 --progress-file progress.json")
    assert code == 2
    assert "progress.json belongs to a calibration with" in err


def test_calibrate_says_how_near_it_came_and_what_it_cost(run: Run) -> None:
    few = "calibrate --out t.json --samples 2 --num-sampling-steps 4 --sampler ddim"
    code, out, _ = run(f"{few} --target-speedup 1.25")  # one step may be cached
    assert code == 0
    assert "speed-up by MACs: 1.32x, not 1.25x: no table of these rules is nearer" in out
    assert re.search(r"cost: \d\.\d uncached samplings by MACs, \d\.\d+ for each sample", out)
    assert "target_speedup = 1.25" in out
    code, out, err = run(f"{few} --target-speedup 1.32")
    assert (code, err) == (0, "")
    assert "speed-up by MACs: 1.32x, where 1.32x was asked for" in out


def test_compare(run: Run) -> None:
    code, out, err = run(
        "compare --methods no-cache fora:2 steps:1 eps-scale:0.9 --samples 32 --num-sampling-steps 3 --out there"
    )
    assert (code, err) == (0, "")
    assert files() == ["there/frontier.png", "there/report.json"]
    report = json.loads(Path("there/report.json").read_text())
    assert [len(entry["step_types"]) for entry in report["methods"]] == [3, 3, 1, 3]
    assert [entry["eps_scale"] for entry in report["methods"]] == [1, 1, 1, 0.9]
    assert all(entry["name"] in out for entry in report["methods"])


def test_compare_a_model_and_a_method_of_one_s_own(run: Run, tmp_path: Path) -> None:
    """No classifier knows its classes: costs, times and errors alone, which anybody can compute from the samples."""
    trained = tiny_dit(3, torch.float32)
    torch.save({"ema": trained.state_dict()}, tmp_path / "tiny.pt")
    (tmp_path / "mine.py").write_text(
        "from ebcache_fast.policies import fora\n\ndef every_third(timesteps, shape):\n"
        "    return fora(timesteps, 3, shape)\n"
    )
    line = (
        f"compare {USE_TINY} --ckpt tiny.pt --methods no-cache mine.py:every_third steps:2 --samples 5 --labels 3 1"
        " --num-sampling-steps 4 --sampler ddim --cfg-scale 2 --global-seed 6 --out there"
    )
    code, out, err = run(line)
    assert (code, err) == (0, "")
    assert "recognised" not in out
    assert "(other steps)" in next(row for row in out.splitlines() if "2 steps" in row)
    report = json.loads(Path("there/report.json").read_text())
    assert report["labels"] == [3, 1, 3, 1, 3]
    assert report.items() >= {"model": TINY, "sampler": "ddim", "cfg_scale": 2.0, "seed": 6}.items()
    assert [entry["noise"] for entry in report["methods"]] == ["same", "same", "other steps"]
    assert "scores" not in report["methods"][0]
    settings = {"steps": 4, "sampler": "ddim", "cfg_scale": 2.0, "seed": 6}
    plan = fora(tuple(report["methods"][1]["timesteps"]), 3, as_denoiser(trained).shape)
    labels = report["labels"]
    plain, cached = (sample(trained, labels, **settings, table=table) for table in (None, plan))
    expected = (cached - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert report["methods"][1]["per_sample"]["paired_error"] == pytest.approx(expected.tolist(), rel=1e-5)
    again = report["command"].removeprefix("ebcache-fast ").replace("--out there", "--out again")
    assert run(again).code == 0
    figures = [
        [entry["per_sample"] for entry in json.loads(Path(folder, "report.json").read_text())["methods"]]
        for folder in ("there", "again")
    ]
    assert figures[0] == figures[1]


def test_compare_by_default_is_of_the_tables_for_the_setting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    monkeypatch.setattr(
        compare, "measure", lambda model, methods, *_, **__: named.extend(m.name for m in methods) or exit()
    )
    with pytest.raises(SystemExit):
        run("compare --samples 32 --num-sampling-steps 20 --sampler ddim")
    assert {"Table letters-ddim-20-1.5x", "Table letters-ddim-20-2.5x", "8 steps"} <= set(named)


def test_compare_without_a_folder_writes_nothing(run: Run) -> None:
    code, out, _ = run("compare --methods steps:1 --samples 32")
    assert code == 0
    assert "1 steps" in out
    assert files() == []


def test_profile(run: Run, tmp_path: Path) -> None:
    torch.save(tiny_dit(3, torch.float32).state_dict(), tmp_path / "tiny.pt")
    CacheTable([999, 600, 400, 0], [NO, ATTN_MLP, ATTN_MLP, NO]).save(tmp_path / "mine.json")
    code, out, err = run(f"profile {USE_TINY} --ckpt tiny.pt --table mine.json --num-samples 3 --out there")
    assert (code, err) == (0, "")
    written = ["there/timeline.json", "there/timeline.png", "there/trace.json"]
    assert files() == ["mine.json", *written, "tiny.pt"]
    assert out.splitlines()[-3:] == written
    timeline = json.loads(Path(written[0]).read_text())
    assert timeline["about"].items() >= {"model": TINY, "table": "mine.json", "samples": 3}.items()
    for step_type, steps in (("NO_CACHE", 2), ("ATTN_MLP", 2)):
        (row,) = (line for line in out.splitlines() if step_type in line)
        assert row.split("│")[2].strip() == str(steps)
    assert "3 samples" in out
    assert "no GPU" in out
    assert "0 CUDA graph replays, 3 eager dispatches" in out


def test_profile_as_it_comes(run: Run) -> None:
    """The bundled model under its table; without the trace, which another profiler would not bear."""
    assert run("profile --num-samples 1 --no-trace --eager").code == 0
    assert files() == ["ebcache-profile/timeline.json", "ebcache-profile/timeline.png"]


@pytest.mark.parametrize("name", named_tables())
def test_table_show(name: str, run: Run) -> None:
    code, out, err = run(f"table show {name}")
    assert (code, err) == (0, "")
    table = CacheTable.named(name)
    signs = {step_type: console.SIGNS[step_type] for step_type in set(table.type_names)}
    assert out.splitlines()[0] == "".join(signs[step_type] for step_type in table.type_names)
    for step_type, sign in signs.items():
        assert f"{sign} {step_type} {table.type_names.count(step_type)}" in out
    assert f"{len(table)} steps, timesteps {table.timesteps[0]} to {table.timesteps[-1]}" in out


def test_table_show_of_programs(run: Run) -> None:
    sites = len(as_denoiser(letters().model).shape.sites)
    code, out, err = run("table show fora-3-50 --program")
    assert (code, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    full = lines.index(f"NO_CACHE: runs 18 times; {sites + 1} launches and {sites} branches")
    assert " multiply-accumulates (one guidance branch), at least " in lines[full + 1]
    assert lines[full + 2 : full + 4] == ["  embed_norm          0.self_attn", "  branch              0.self_attn"]
    pair = lines.index("2 x ATTN_MLP: runs 16 times; 2 launches and 0 branches")
    assert lines[pair + 2] == f"  sums                + 0.self_attn .. {sites // 2 - 1}.mlp ({sites})  x 2"
    assert lines[-1].startswith(f"2 programs, each one graph; {sites} slots are kept, ")
    code, _, err = run("table show letters-ddim-20-2.5x --program --model DiT-tiny")
    assert (code, err.count("\n")) == (2, 1)


def test_table_show_of_a_file_says_what_it_is_for(run: Run, tmp_path: Path) -> None:
    spec = SamplerSpec(name="ddim", steps=5, train_steps=1000)
    types = [NO, ATTN_MLP, ATTN_MLP, NO, MLP]
    CacheTable([9, 7, 5, 3, 1], types, 0.98, spec, {"depth": 2}).save(tmp_path / "t.json")
    out = run("table show t.json").out.splitlines()
    assert out[1:] == [
        "# NO_CACHE 2  . ATTN_MLP 2  m MLP 1",
        "5 steps, timesteps 9 to 1, eps_scale 0.98",
        "sampler: ddim",
        "model: depth 2",
        "NOx1 A+Mx2 NOx1 MLPx1",
    ]


def test_table_check(run: Run) -> None:
    code, out, _ = run(f"table check {LETTERS_50}")
    shape = as_denoiser(letters().model).shape
    limit = CacheTable.named(LETTERS_50).plan(shape).mac_limit(shape)
    assert code == 0
    assert "fits: 50 steps" in out
    assert f"over no caching: {limit:.2f}x" in out
    assert run(f"table check fora-2-50 {USE_TINY}").code == 0  # for any model


def test_table_check_counts_what_the_paper_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "DIT_MODELS", {"DiT-XL/2": partial(DiT, patch_size=2)})
        code, out, _ = run("table check eb-cache-released-50 --model DiT-XL/2")
    assert code == 0
    assert "34 NO + 16 A+M" in out
    assert "4.03" in out


def test_table_import_from_npy(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "theirs.npy", np.array([0, 2, 1, 0]))
    code, out, err = run("table import theirs.npy --out ours.json --steps 4 --eps-scale 0.97")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "ours.json"
    table = CacheTable.load("ours.json")
    assert table.step_types == (NO, ATTN_MLP, ATTENTION, NO)
    assert (table.timesteps, table.eps_scale) == ((999, 666, 333, 0), 0.97)
    run("table import theirs.npy --out other.json --steps 4 --order index --spacing stride --adm-lambda 1.25")
    table = CacheTable.load("other.json")
    assert table.step_types == (NO, ATTENTION, ATTN_MLP, NO)
    assert (table.timesteps, table.eps_scale) == ((750, 500, 250, 0), 0.8)


def test_table_import_from_smoothcache(run: Run, tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text(json.dumps({"attn": [1, 0, 0, 1], "mlp": [1, 1, 0, 1]}))
    line = "table import theirs.json --kind smoothcache --out ours.json --steps 4"
    assert run(f"{line} --eb-delta 0.8 --allow-amplify").code == 0
    table = CacheTable.load("ours.json")
    assert [step_type.name for step_type in table.step_types] == [
        "NO_CACHE",
        "SELF_ATTENTION",
        "SELF_ATTN_MLP",
        "NO_CACHE",
    ]
    assert table.eps_scale == 1.25
    assert run(f"{line} --eb-delta 0.8").code == 2


def test_table_import_of_lists_for_single_layers(run: Run, tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text(json.dumps({"attn-0": [1, 0, 1], "mlp-7": [1, 1, 0]}))
    line = "table import theirs.json --out ours.json --steps 3"
    assert_one_line(run(line), "theirs.json: it has lists for single layers, .* give its depth")
    code, out, err = run(f"{line} --model letters")
    assert (code, err) == (0, "")
    assert "sites: 8 layers of SELF_ATTN + MLP" in out
    assert run("table check ours.json").out.startswith("fits: 3 steps, 1 NO + 2 mixed")
    by_depth = run(f"{line.replace('ours', 'other')} --depth 8")
    assert (by_depth.code, Path("other.json").read_text()) == (0, Path("ours.json").read_text())
    assert run(f"{line} --depth 9 --branches self_attn cross_attn mlp").code == 0
    assert_one_line(run("table check ours.json"), "the table is for 9 layers of .*CROSS.*, not 8 layers of")
    assert_one_line(
        run(f"{line} --depth 7"), "theirs.json: MLP: .* of layers 0 to 6, got one for layer 7; give the depth"
    )
    assert_one_line(run(f"{line} --depth 8 --model letters"), "--model letters says how many .*; leave out --depth 8")
    np.save(tmp_path / "theirs.npy", np.array([0, 2, 1]))
    assert_one_line(
        run(f"{line.replace('.json --out', '.npy --out')} --depth 8"), "theirs.npy: .* leave out --model and"
    )


def test_a_table_of_every_step_type_is_shown(run: Run) -> None:
    CacheTable(range(len(StepType))[::-1], StepType).save("all.json")
    code, out, _ = run("table show all.json")
    assert code == 0
    for step_type in StepType:
        assert f"{step_type.name} 1" in out
    code, _, err = run("table check all.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "CROSS_ATTENTION" in err


def test_a_file_of_several_tables(run: Run) -> None:
    short, long = (CacheTable(range(900, 0, -step), [0, *[2] * (900 // step - 1)]) for step in (300, 150))
    TableSet([short, long]).save("set.json")
    code, out, _ = run("table show set.json")
    assert (code, out.count("3 steps, timesteps 900 to 300"), out.count("6 steps, timesteps 900 to 150")) == (0, 1, 1)
    code, out, _ = run("table check set.json")
    assert (code, out.count("fits: 3 steps"), out.count("fits: 6 steps")) == (0, 1, 1)
    line = "sample --table set.json --text A"
    assert run(f"{line} --num-sampling-steps 3").code == 0
    assert np.array_equal(arr_0("samples/samples.npz"), to_pixels(sample(letters().model, [0], table=short)).numpy())
    code, _, err = run(line)
    assert (code, err.count("\n")) == (2, 1)
    assert "set.json: steps: expected one of 3, 6" in err


def test_info(run: Run) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for word in (__version__, torch.__version__, "Triton", "run_update: torch", *named_tables()):
        assert word in out


def test_help_is_printed_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in (("--help", cli.COMMANDS), ("sample --help", ("--cfg-scale", "--sample-dir", *SAMPLERS))):
        with pytest.raises(SystemExit) as stopped:
            cli.main(line.split())
        assert not stopped.value.code
        out, err = capsys.readouterr()
        assert all(word in out for word in words)
        assert err == ""


def test_an_interrupt_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "print_info", interrupted)
    assert run("info") == (130, "", "")


def test_a_progress_bar_is_for_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw() -> str:
        with console.progress_bar() as bar:
            bar.reset(10)
            bar.update(10)
            bar.refresh()
        return capsys.readouterr().err

    assert draw() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "10.0/10.0" in draw()


# ------------------------------------------------------------------------------------------------- bad input


class Trap:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong in all kinds of ways, and a few that are right for something else."""
    tmp_path = tmp_path_factory.mktemp("odds")
    (tmp_path / "empty").touch()
    (tmp_path / "line\nbreak.json").write_text("{")
    (tmp_path / "foreign.safetensors").write_bytes(b"GIF89a, and more of it")
    (tmp_path / "foreign.pt").write_bytes(b"GIF89a, and more of it")
    (tmp_path / "trap.pt").write_bytes(pickle.dumps({"model": Trap()}))
    torch.save(tiny_dit(0, torch.float32).state_dict(), tmp_path / "tiny.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "tiny.pt").read_bytes()[:-5000])
    torch.save(tiny_dit(0, torch.float32, depth=3).state_dict(), tmp_path / "deeper.pt")
    np.save(tmp_path / "object.npy", np.array([0, None], dtype=object))
    np.save(tmp_path / "short.npy", np.array([0, 2]))
    CacheTable([9, 0], [NO] * 2, model={"depth": 77}).save(tmp_path / "other_model.json")
    (tmp_path / "truncated.json").write_text((tmp_path / "other_model.json").read_text()[:-40])
    return tmp_path


@pytest.fixture
def odds(odd_files: Path, tmp_path: Path) -> None:
    """Those in the folder of a test."""
    shutil.copytree(odd_files, tmp_path, dirs_exist_ok=True)


# As typed, and a part of the line that answers.
BAD_INPUT = [
    # words that are no command, option or value
    ("", r"Expected one of .*demo.*; ebcache-fast --help"),
    ("frobnicate", "Unrecognized options: frobnicate; ebcache-fast --help"),
    ("table", "Unrecognized options: table;"),
    ("table frobnicate", "Unrecognized options: table"),
    ("table show", "Missing from ebcache-fast table-show: "),
    ("sample --frobnicate 3", "Unrecognized options: --frobnicate, 3"),
    ("sample --num-samples many", "--num-samples: .*'many'"),
    ("calibrate", "Missing from ebcache-fast calibrate: --out"),
    ("calibrate --out t.json --criterion taste", "invalid choice 'taste' for argument '--criterion'"),
    # demo
    ("demo --text A1", "text 'A1' must be letters A to Z alone; leave out '1'"),
    ("demo --text=", "text '' is empty"),
    ("demo --samples 31", "samples=31 is below 32"),
    ("demo --samples 1000000000", "samples=1000000000 would hold .*; ask for at most"),
    ("demo --samples -1", "samples=-1 is below 32"),
    ("demo --seed -1 --samples 32", r"seed=-1 is outside \[0, 2\*\*64\)"),
    ("demo --out empty", "empty can't be made: File exists; choose another folder"),
    ("demo --out empty/below", "empty/below can't be made: Not a directory"),
    # sample: numbers
    ("sample --text B4", "text 'B4' must be letters"),
    ("sample --num-samples 0", "0 samples were asked for; ask for at least one"),
    ("sample --num-sampling-steps 0", r"steps=0 is outside \[1, 1000\]"),
    ("sample --num-sampling-steps 1001", r"steps=1001 is outside \[1, 1000\]"),
    ("sample --sampler euler", "sampler 'euler' is unknown; choose one of ddpm, ddim"),
    ("sample --cfg-scale nan", r"cfg_scale=nan is outside \[0, inf\)"),
    ("sample --cfg-scale -1", r"cfg_scale=-1.0 is outside \[0, inf\)"),
    ("sample --eps-scale 0", r"eps_scale=0.0 is outside \(0, 1\]"),
    ("sample --eps-scale 1.001", r"eps_scale=1.001 is outside \(0, 1\]"),
    ("sample --eps-scale nan", r"eps_scale=nan is outside \(0, 1\]"),
    ("sample --per-proc-batch-size 0", "batch_size=0 is below 1"),
    ("sample --global-seed 99999999999999999999", r"seed=99999999999999999999 is outside"),
    ("sample --sample-dir empty", "empty can't be made: File exists"),
    # sample: tables
    ("sample --table nope", "expected .*one of .*fora-2-50.*, got 'nope'"),
    ("sample --table missing.json", "missing.json: can't be read: No such file"),
    ("sample --table truncated.json", "truncated.json: expected strict JSON"),
    ("sample --table other_model.json", "model: the table is for .*depth 77, not 8"),
    (
        f"sample --table {LETTERS_50} --num-sampling-steps 20",
        "steps=20: the table is for 50 steps; use one made for 20",
    ),
    (f"sample {USE_TINY} --ckpt tiny.pt --table {LETTERS_50}", "the table is for .*; use a table made for this model"),
    # sample: models
    ("sample --model DiT-XXL/1", f"model 'DiT-XXL/1' is unknown; choose letters, diffusers, {TINY}"),
    ("sample --ckpt tiny.pt", "model 'letters' has its own weights; leave out --ckpt"),
    (f"sample {USE_TINY}", f"model '{TINY}' needs its weights; pass --ckpt FILE.pt"),
    (f"sample {USE_TINY} --ckpt missing.pt", "missing.pt can't be read"),
    (f"sample {USE_TINY} --ckpt empty", "empty: expected the suffix .pt or .pth or .safetensors"),
    (f"sample {USE_TINY} --ckpt truncated.pt", "truncated.pt can't be read .*; pass an undamaged checkpoint"),
    (f"sample {USE_TINY} --ckpt foreign.pt", "foreign.pt can't be read .*; pass an undamaged checkpoint"),
    (f"sample {USE_TINY} --ckpt foreign.safetensors", "foreign.safetensors can't be read .*; pass an undamaged"),
    (f"sample {USE_TINY} --ckpt trap.pt", "trap.pt can't be read .*; pass an undamaged checkpoint"),
    (f"sample {USE_TINY} --ckpt deeper.pt", "deeper.pt: 'blocks.2.* expected no such key"),
    (f"sample --model {TINY} --image-size 64 --ckpt tiny.pt", r"'y_embedder.* expected shape \(1001, 16\), got shape"),
    (f"sample --model {TINY} --image-size 100 --ckpt tiny.pt", "image_size=100 is no multiple of 8"),
    (f"sample --model {TINY} --num-classes 0 --ckpt tiny.pt", "num_classes=0 is outside"),
    (f"sample {USE_TINY} --ckpt tiny.pt --text Z", r"label 25 is outside \[0, 4\]; this model has 5 classes"),
    # calibrate
    ("calibrate --out t.json --samples 0", "samples=0 and batch_size=64 must be 1 or more"),
    ("calibrate --out t.json --a nan", "a=nan and k=0.15 must be finite"),
    ("calibrate --out t.json --max-run -1", "max_run=-1 is below 1"),
    ("calibrate --out t.json --target-speedup 20", r"target_speedup=20 is outside \[1, \d+.\d+\], .*ask for less"),
    ("calibrate --out t.json --target-speedup 2 --num-sampling-steps 1", r"is outside \[1, 1.00\]"),
    ("calibrate --out t.json --max-run 3 --target-speedup 20", r"=20 is outside \[1, \d.\d+\], .*ask for less"),
    ("calibrate --out t.json --a 1 --target-speedup 1.5 --num-sampling-steps 3", r"is outside \[1, 1.00\]"),
    ("calibrate --out t.json --method algorithm1 --target-speedup 0.9", r"target_speedup=0.9 is outside \[1, 3.33\]"),
    ("calibrate --out t.json --method path --a 1", r"algorithm is Algorithm 1's, and method='path' has none"),
    ("calibrate --out t.json --eps-scale 1.1", r"eps_scale=1.1 is outside \(0, 1\]"),
    ("calibrate --out t.json --cfg-scale inf", "cfg_scale=inf is outside"),
    ("calibrate --out t.json --progress-file empty", "empty is not a calibration's progress file"),
    ("calibrate --out empty/t.json", "empty can't be made: File exists; choose another folder"),
    ("calibrate --out .", ". is a folder; name a file in it"),
    # compare
    ("compare --methods", "no method was given; name at least one"),
    ("compare --methods nope", "method 'nope' is unknown; choose from no-cache, table:FILE_OR_NAME, steps:N"),
    ("compare --per-proc-batch-size 0", "batch_size=0 is below 1"),
    ("compare --cfg-scale nan", r"cfg_scale=nan is outside \[0, inf\)"),
    ("compare --num-sampling-steps 0", r"steps=0 is outside \[1, 1000\]"),
    ("compare --methods no-cache fora:x", "method 'fora:x': could not convert .*; write it as one of"),
    ("compare --methods fora:0", "interval: expected 1 or more, got 0.0"),
    ("compare --methods eps-scale:1.1", r"method 'eps-scale:1.1': first: b is outside \(0, 1\]"),
    ("compare --methods table:other_model.json", "the table is for .*; use a table made for this model"),
    (
        f"compare --methods no-cache table:{LETTERS_50} --sampler ddim",
        "is for the sampler 'ddpm' .* all methods are run by 'ddim' .*; pass --sampler ddpm, or retime",
    ),
    ("compare --methods no-cache nobody_s:policy", "ModuleNotFoundError: No module named 'nobody_s'; name a function"),
    ("compare --methods no-cache os:getcwd", "method 'os:getcwd': TypeError: .*; name a function"),
    ("compare --methods no-cache --labels 26", r"label 26 is outside \[0, 25\]"),
    (f"compare {USE_TINY} --ckpt tiny.pt --samples 1", "samples=1 is below 2"),
    (f"compare {USE_TINY}", f"model '{TINY}' needs its weights"),
    ("compare --methods no-cache --samples 8", "samples=8 is below 32"),
    ("compare --methods no-cache --out empty", "empty can't be made"),
    ("compare --methods no-cache --sampler euler --samples 32", "sampler 'euler' is unknown"),
    # profile
    ("profile --num-samples 0", "0 samples were asked for"),
    ("profile --table nope", "expected .*one of .*fora-2-50.*, got 'nope'"),
    ("profile --cfg-scale nan", "cfg_scale=nan is outside"),
    ("profile --out empty", "empty can't be made: File exists"),
    (f"profile {USE_TINY} --ckpt tiny.pt", "the table is for .*; use a table made for this model"),
    # table
    ("table show nope", "expected .*one of .*fora-2-50.*, got 'nope'"),
    ("table show empty.json", "empty.json: can't be read"),
    ("table check other_model.json", "the table is for .*depth 77, not 8"),
    (f"table check {LETTERS_50} {USE_TINY}", "use a table made for this model"),
    ("table check fora-2-50 --model nope", "model 'nope' is unknown"),
    ("table import missing --out t.json", "missing: can't be read: No such file"),
    ("table import empty --out t.json", "empty: expected a .npy array"),
    ("table import object.npy --out t.json --steps 2", "expected a .npy array, saved without pickle"),
    ("table import short.npy --out t.json", "step_types: expected 50, one per timestep, got 2"),
    ("table import short.npy --out t.json --steps 2 --eps-scale 1.1", "eps_scale: .* at most 1, got 1.1"),
    ("table import short.npy --out t.json --eps-scale 1 --adm-lambda 1", "all mean b; give one of them"),
    ("table import short.npy --out t.json --steps 60 --spacing stride", "steps=60: no integer stride"),
    ("table import short.npy --out empty/t.json --steps 2", "empty/t.json: can't be written: Not a directory"),
    ("table import truncated.json --kind smoothcache --out t.json", "truncated.json: expected strict JSON"),
]


def assert_one_line(outcome: Outcome, problem: str) -> None:
    code, _, err = outcome
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("ebcache-fast: ")
    assert re.search(problem, err), err
    assert "Traceback" not in err


@pytest.mark.usefixtures("odds")
@pytest.mark.parametrize(("line", "problem"), BAD_INPUT, ids=[line or "nothing" for line, _ in BAD_INPUT])
def test_bad_input_is_one_line(line: str, problem: str, run: Run) -> None:
    before = contents()
    assert_one_line(run(line), problem)
    assert contents() == before


@pytest.mark.usefixtures("odds")
def test_a_line_break_in_a_name_stays_in_the_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("info")  # moves into the folder
    code = cli.main(["table", "show", "line\nbreak.json"])
    assert_one_line(Outcome(code, *capsys.readouterr()), r"line break\.json: expected strict JSON")


def test_a_full_disk_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(28, os.strerror(28))

    for owner, writer, line, name in (
        (job.np, "savez", "sample --num-samples 1 --num-sampling-steps 1", "samples.npz"),
        (Image.Image, "save", "sample --num-samples 1 --num-sampling-steps 1", "samples.png"),
        (Image.Image, "save", "demo --samples 32", "comparison.png"),
        (Path, "write_text", "compare --methods steps:1 --samples 32 --out there", "report.json"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, writer, full)
            assert_one_line(run(line), f"{name}: can't be written: No space left on device")
    assert files() == ["samples/samples.npz"]  # whole, of the second, whose picture found no room


# ------------------------------------------------------------------------------------------- as a program


def program(line: str, folder: Path) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "ebcache_fast", *line.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_as_a_program(tmp_path: Path) -> None:
    code, out, err = program("sample --text A --num-sampling-steps 1", tmp_path)
    assert (code, out, err) == (0, "samples/samples.npz\nsamples/samples.png\n", "")


def test_bad_input_to_the_program(tmp_path: Path) -> None:
    outcome = program("sample --text A --cfg-scale nan", tmp_path)
    assert_one_line(outcome, "cfg_scale=nan is outside")
    assert outcome.out == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
