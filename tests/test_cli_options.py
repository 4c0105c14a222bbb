"""What a command's model computes in and where, and every number of every command beyond its range."""

import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from depth import EVERY, deep
from diffusers_tiny import tiny_pipeline
from tiny import CLASSES, SIZES, tiny_dit
from torch import Tensor, nn

from ebcache_fast.apps import bundled as presets
from ebcache_fast.apps import cli
from ebcache_fast.apps import jobs as job
from ebcache_fast.apps.bundled import open_model
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.models import DiT, as_denoiser
from ebcache_fast.plan import StepType
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.sampling import sample

TINY = "DiT-tiny"
MODEL = f"--model {TINY} --image-size 64 --num-classes {CLASSES} --ckpt tiny.pt"
FULL, REUSED = StepType.NO_CACHE, StepType.ATTN_MLP


class Outcome(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str


Run = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, a table and a schedule."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.save(tiny_dit(3, torch.bfloat16).state_dict(), folder / "tiny.pt")
    CacheTable([999, 500, 0], [FULL, REUSED, FULL]).save(folder / "t.json")
    np.save(folder / "theirs.npy", np.array([0, 2, 2, 0]))
    return folder


@pytest.fixture
def run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in a folder with these."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "DIT_MODELS", {TINY: partial(DiT, **SIZES)})

    def once(line: str) -> Outcome:
        return Outcome(cli.main(line.split()), *capsys.readouterr())

    return once


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ("", torch.bfloat16),
        ("--dtype float32", torch.float32),
        ("--dtype float16", torch.float16),
        ("--dtype bfloat16 --device cpu", torch.bfloat16),
    ],
)
def test_a_model_computes_in_what_its_weights_are_in_or_as_asked(option: str, dtype: torch.dtype, run: Run) -> None:
    assert run(f"sample {MODEL} {option} --table t.json --num-samples 2 --sampler ddim") == (
        0,
        "samples/samples.npz\n",
        "",
    )
    model = tiny_dit(3, torch.bfloat16).to(dtype)
    expected = sample(model, [0, 1], table=CacheTable.load("t.json"), sampler="ddim")
    with np.load("samples/samples.npz") as found:
        assert np.array_equal(found["arr_0"], expected.numpy())
    assert run(f"profile {MODEL} {option} --table t.json --num-samples 1 --no-trace").code == 0
    assert json.loads(Path("ebcache-profile/timeline.json").read_text())["about"]["dtype"] == str(dtype)
    assert run(f"calibrate {MODEL} {option} --samples 2 --num-sampling-steps 4 --out made.json").code == 0
    assert run(f"compare {MODEL} {option} --samples 2 --num-sampling-steps 2 --methods no-cache").code == 0


def test_the_bundled_model_in_another_dtype() -> None:
    assert as_denoiser(open_model("letters", None, 256, 1000)).weight().dtype == torch.float32
    assert as_denoiser(open_model("letters", None, 256, 1000, "bfloat16")).weight().dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_folder_s_model_computes_in_what_it_was_saved_in(stored: torch.dtype, tmp_path: Path) -> None:
    tiny_pipeline().transformer.to(stored).save_pretrained(tmp_path / "transformer")
    for folder in (tmp_path, tmp_path / "transformer"):
        assert as_denoiser(open_model("diffusers", folder, 256, 1000)).weight().dtype == stored
        assert as_denoiser(open_model("diffusers", folder, 256, 1000, "float16")).weight().dtype == torch.float16


BAD = [
    ("--dtype int8", "invalid choice 'int8' for argument '--dtype'"),
    ("--dtype float64", "invalid choice 'float64'"),
    ("--device gpu", "device 'gpu' can't be used here .*; choose c"),
    ("--device cuda:99", "device 'cuda:99' can't be used here .*; choose c"),
    ("--device meta", "device 'meta' can't be used here .*; choose c"),
    ("--device=", "device '' can't be used here .*; choose c"),
]


@pytest.mark.parametrize("command", ["sample", "profile", "compare", "calibrate --out t2.json"])
@pytest.mark.parametrize(("option", "problem"), BAD)
def test_a_place_or_a_dtype_that_there_is_not(command: str, option: str, problem: str, run: Run) -> None:
    assert_refused(run(f"{command} {MODEL} {option}"), problem)


@pytest.mark.parametrize("command", ["sample", "profile", "calibrate --out made.json"])
@pytest.mark.parametrize("option", ["", "--dtype bfloat16", "--dtype float16"])
def test_float8_on_a_cpu_is_refused(command: str, option: str, run: Run) -> None:
    assert_refused(run(f"{command} {MODEL} {option} --device cpu --fp8"), "fp8=True on a CPU gains nothing; leave out")
    assert_refused(run(f"{command} --device cpu --fp8"), "fp8=True on a CPU gains nothing")


def test_float8_reaches_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is allowed; a stand-in tells what the command sampled with."""
    seen: list[bool] = []

    def chosen(model: nn.Module, *, fp8: bool) -> EngineOptions:
        return EngineOptions(fp8=fp8)  # which the reference runs on a CPU, for tests such as this

    def sampled(model: nn.Module, labels: list[int], *, engine: Engine, **_: object) -> Tensor:
        seen.append(engine.options.fp8)
        return torch.zeros(len(labels), 4, 8, 8)

    monkeypatch.setattr(presets, "engine_options", chosen)
    monkeypatch.setattr(job, "sample", sampled)
    for option in ("", "--fp8"):
        assert run(f"sample {MODEL} {option} --num-samples 2").code == 0
    assert seen == [False, True]


def assert_refused(outcome: Outcome, problem: str) -> None:
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("ebcache-fast: ")
    assert re.search(problem, line), line


LINES = {
    "demo": "demo",
    "sample": f"sample {MODEL}",
    "calibrate": f"calibrate {MODEL} --out made.json",
    "compare": f"compare {MODEL} --methods no-cache",
    "profile": f"profile {MODEL} --table t.json --no-trace",
    "table-check": f"table check t.json --model {TINY} --image-size 64",
    "table-import": "table import theirs.npy --out made.json --steps 4",
}
QUICK = {
    "samples": "--samples 2",
    "num_samples": "--num-samples 2",
    "num_sampling_steps": "--num-sampling-steps 4",
}
# What every whole number of a command refuses, and every fraction.
NO_INTEGERS, NO_FRACTIONS = ("nan", "inf", "1.5", "-1", "9" * 23), ("nan", "inf", "-inf")
ANY = {
    ("sample", "per_proc_batch_size"): {"9" * 23},
    ("compare", "per_proc_batch_size"): {"9" * 23},
}  # no more are run at once than there are


def numbers() -> Iterator[Any]:
    """Every command, option and value out of range; of each option a value or two are quick."""
    place = count()
    for name in LINES:
        for parameter in inspect.signature(cli.COMMANDS[name]).parameters.values():
            kind = str(parameter.annotation)
            if "Literal" not in kind and ("int" in kind or "float" in kind):
                values = NO_INTEGERS if "int" in kind else NO_FRACTIONS
                first = next(place) % EVERY
                for i, value in enumerate(values):
                    yield (pytest.param if i % EVERY == first else deep)(name, parameter.name, value)


@pytest.mark.parametrize(("name", "option", "value"), [*numbers()])
def test_a_number_out_of_range_is_one_line(name: str, option: str, value: str, run: Run) -> None:
    known = inspect.signature(cli.COMMANDS[name]).parameters
    quick = " ".join(words for other, words in QUICK.items() if other in known and other != option and name != "demo")
    outcome = run(f"{LINES[name]} {quick} --{option.replace('_', '-')} {value}")
    if value in ANY.get((name, option), ()):
        assert outcome.code == 0
    else:
        assert_refused(outcome, "")
        assert not list(Path().rglob("*.npz"))
