"""All that only a GPU can tell, by one command in under 9 minutes, into one JSON file.

    python -m bench.gpu_suite [--out FILE]          by default gpu-suite.json in the folder $OUT, else in bench/results
    python -m bench.gpu_suite --stages correctness steps
    python -m bench.gpu_suite --dry-run             every stage, tiny, on the CPU: proves the script, measures nothing

Stages, each with its time and in a process of its own; what fails is recorded, and the next one runs all the same. The
file is written after each:

correctness   the tests of the engine's graphs, of the engine over the kernels, and of the kernels
text_models   the same of the engine over PixArt and CogVideoX, where diffusers is installed
steps         bench/test_steps.py: every type of step, small sizes first
trajectories  whole runs, likewise
benchmarks    bench/test_kernels.py at every size, without torch.compile
compiled      the same with torch.compile, at 256 px and B=1: it compiles for seconds a kernel
memcheck      every kernel under compute-sanitizer, where that is installed

Without a GPU it says so and exits 0. With one it exits 1 if a test, a memory check or a benchmark failed; a stage that
could not run, or ran out of time, says so in the file.

A bare machine needs torch, triton and numpy, and these packages, as wheels where there is no registry:

    pydantic pydantic-core annotated-types typing-inspection safetensors    the package itself
    pytest pluggy iniconfig packaging pygments                              every stage but memcheck
    hypothesis sortedcontainers                                             correctness
    diffusers, and what it needs                                            text_models; optional
    pytest-xdist execnet                                                    many cores for correctness; optional
    pytest-benchmark py-cpuinfo2                                            all benchmarks
    nvidia-ml-py                                                            the GPU's state; optional

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels NAME ...
    pip install --no-index --no-deps --target site wheels/*.whl && PYTHONPATH=site python -m bench.gpu_suite
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import torch

from bench.kernel_cases import CALLS
from bench.kernel_contenders import TINY
from bench.kernel_operands import XL_256, KernelOperands
from bench.stage import GRACE, ROOT, Outcome, run
from bench.telemetry import telemetry

RESULTS = ROOT / "bench" / "results"
DRY_SECONDS = math.inf  # a stage's in a dry run, where nothing is measured and the machine may be busy
# What was never seen before comes first: there may be no time for all.
ENGINE_TESTS = ("test_cuda_graphs.py", "test_engine_triton.py", "test_engine_float8.py", "test_launches.py")
LIBRARY_TEST = "test_ops.py::test_the_librarys_gelu_is_the_tanh_one"
# Libraries are others there than those that the tests pin.
WARNINGS = ("-W", "default::DeprecationWarning", "-W", "default::FutureWarning")
SANITIZER = "compute-sanitizer"


def missing(*modules: str) -> Outcome | None:
    """What to say where Python packages are not installed."""
    absent = [name for name in modules if find_spec(name) is None]
    names = ", ".join(absent).replace("_", "-")
    return Outcome("skipped", f"no {names} here: carry the wheels that bench/gpu_suite.py names") if absent else None


def correctness(seconds: float, dry: bool) -> Outcome:
    """The same tests as everywhere, on CUDA; on a CPU a few of them."""
    absent = missing("pytest", "hypothesis")
    if absent:
        return absent
    if dry:
        return tested(["tests/test_kernels.py", "-k", "embed.embed-plain"], seconds)
    files = sorted(path.name for path in (ROOT / "tests").glob("test_kernels*.py"))
    parallel = ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") else []  # compiling takes the time
    return tested([*(f"tests/{name}" for name in (LIBRARY_TEST, *ENGINE_TESTS, *files)), *parallel], seconds)


def text_models(seconds: float, dry: bool) -> Outcome:
    """The engine over the parts of PixArt and CogVideoX: kernels, graphs, modules at the ends."""
    absent = missing("pytest", "diffusers")
    if absent:
        return absent
    chosen = "memory_is_said_before" if dry else "every_step_type or layer_by_layer or cuda_graphs or hooked"
    return tested(["tests/test_engine_diffusers.py", "-k", chosen], seconds)


def tested(arguments: Sequence[str], seconds: float) -> Outcome:
    """A run of pytest: how many tests did what, and why those that did not pass did not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        how = "-q", "--tb=short", "-p", "no:cacheprovider", *WARNINGS, f"--junitxml={report}"
        command = [sys.executable, "-m", "pytest", "-m", "", *how, *arguments]  # the slow ones too
        ended = run(command, seconds, PYTEST_ADDOPTS="")  # what is asked of the whole suite is not meant here
        return ended.with_found(counts(ElementTree.parse(report)) if report.exists() else {})


def counts(report: "ElementTree.ElementTree[Any]") -> dict[str, Any]:
    """What pytest's JUnit report says, in short."""
    suites, kinds = list(report.iter("testsuite")), ("tests", "failures", "errors", "skipped")
    others = {
        f"{case.get('classname')}::{case.get('name')}": f"{end.tag}: {(end.get('message') or '').partition(chr(10))[0]}"
        for case in report.iter("testcase")
        for end in case
        if end.tag in {"failure", "error", "skipped"}
    }
    return {kind: sum(int(each.get(kind, 0)) for each in suites) for kind in kinds} | {"not_passed": others}


def memcheck(seconds: float, dry: bool) -> Outcome:
    """Every kernel once under compute-sanitizer, each tensor an allocation of its own; interpreted in a dry run."""
    script = [sys.executable, "-c", "from bench.gpu_suite import launch_every_kernel as every; every()"]
    if dry:
        return run(script, seconds, TRITON_INTERPRET="1").with_found({"calls": len(CALLS)})
    tool = shutil.which(SANITIZER, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if tool is None:
        return Outcome("skipped", f"no {SANITIZER} here: it comes with the CUDA toolkit")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", *script]
    return run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1").with_found({"calls": len(CALLS), "tool": tool})


def launch_every_kernel() -> None:
    """Each call of `bench.kernel_cases.CALLS`: tiny, and on a GPU also at real widths."""
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float16)
    for model in (TINY, XL_256) if on_gpu else (TINY,):
        operands = KernelOperands(model, 1, dtype, device)
        for call in CALLS.values():
            call(operands)
    if on_gpu:
        torch.cuda.synchronize()


def benchmarks(seconds: float, dry: bool) -> Outcome:
    """Every kernel at every size, without torch.compile."""
    return timed("kernels and not compile", seconds)


def compiled(seconds: float, dry: bool) -> Outcome:
    """Every kernel at one size with torch.compile; in a dry run one kernel, which has only its reference."""
    return timed("kernels and attention" if dry else "kernels and 256px and B1", seconds)


def steps(seconds: float, dry: bool) -> Outcome:
    """Every type of step, operation by operation and as a graph."""
    return timed("steps and not trajectory", seconds)


def trajectories(seconds: float, dry: bool) -> Outcome:
    """Whole runs; in a dry run one."""
    return timed("trajectory and mixed" if dry else "trajectory", seconds)


def timed(chosen: str, seconds: float) -> Outcome:
    """The benchmarks that ``-k`` chooses: what each stored with its result."""
    absent = missing("pytest", "pytest_benchmark")
    if absent:
        return absent
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmarks.json"
        arguments = ["bench", "--benchmark-only", "--benchmark-quiet", "-k", chosen, f"--benchmark-json={report}"]
        ended = tested(arguments, seconds)
        text = report.read_text() if report.exists() else ""
    results = json.loads(text)["benchmarks"] if text else []
    return ended.with_found({"results": [one["extra_info"] for one in results]})


# Each stage, and how many seconds it may take: what one does not use, the next one may.
Stage = Callable[[float, bool], Outcome]
STAGES: tuple[tuple[Stage, int], ...] = (
    (correctness, 150),
    (text_models, 50),
    (steps, 90),
    (trajectories, 90),
    (benchmarks, 70),
    (compiled, 25),
    (memcheck, 40),
)


def suite(stages: Sequence[tuple[Stage, int]], keep: Callable[[dict[str, Any]], None], *, dry: bool) -> dict[str, Any]:
    """Run these stages in turn; all that was found, ready for JSON. ``keep`` gets what there is after each."""
    start, until, done = time.monotonic(), 0.0, dict[str, Any]()
    found = {"dry_run": dry, "seconds": 0.0, "stages": done, "telemetry": {"start": telemetry()}}
    for stage, seconds in stages:
        began, until = time.monotonic(), until + seconds
        ended = attempt(stage, DRY_SECONDS if dry else until - GRACE - (began - start), dry)
        ended = replace(ended, seconds=round(time.monotonic() - began, 1))
        print(f"{stage.__name__}: {ended.status} in {ended.seconds:.0f} s {ended.why}", flush=True)
        done[stage.__name__] = asdict(ended)
        found["seconds"] = round(time.monotonic() - start, 1)
        found["telemetry"] |= {"end": telemetry()}  # type: ignore[operator]
        keep(found)
    return found


def attempt(stage: Stage, seconds: float, dry: bool) -> Outcome:
    """One stage; an error of its own is no reason to lose what the others found."""
    if seconds <= 0:
        return Outcome("out of time", "the stages before it took too long")
    try:
        with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""} if dry else {}):
            return stage(seconds, dry)
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}")


def lines(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for every kernel, step or run and size: each contender's median, and its share of the ceiling."""
    rows: dict[str, list[str]] = {}
    for one in results:
        name = one.get("kernel") or one["what"]
        row = rows.setdefault(f"{name} / {one['model']}, B={one['samples']}", [])
        row.append(f"{one['contender']} {one['median_us']:.1f} us ({100 * one['share_of_ceiling']:.0f}%)")
    return (f"{name}: {', '.join(row)}" for name, row in rows.items())


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if a stage failed, else 0, also without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS) / "gpu-suite.json")
    names = [stage.__name__ for stage, _ in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="in their usual order")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.dry_run:
        print("no GPU: torch.cuda.is_available() is False, so there is nothing to measure; --dry-run needs none")
        return 0
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script: stages would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(found: dict[str, Any]) -> None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")

    found = suite([one for one in STAGES if one[0].__name__ in args.stages], keep, dry=args.dry_run)
    stages = found["stages"].values()
    print(*(line for each in stages for line in lines(each["found"].get("results", ()))), args.out, sep="\n")
    return 1 if any(each["status"] == "failed" for each in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
