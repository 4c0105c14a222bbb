"""Every kernel compiled for sm_80 to sm_120, without a GPU, held to its limits; and that a limit can break.

Kernels compile in processes of their own: in this one Triton interprets.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from constants import ROOT
from torch import Tensor

from bench.kernel_cases import CALLS, WITH_MEMORY
from ebcache_fast.kernels import launch
from ebcache_fast.kernels._order import begin
from ebcache_fast.kernels.launch import OPTIONS

ARCHS = (80, 86, 89, 90, 100, 120)
TOY_ARCHS = (80, 90, 100)
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # that each grants a block


@dataclass(frozen=True)
class Compiled:
    """What a run of bench.kernel_resources left."""

    status: int
    broken: list[str]
    resources: list[dict[str, Any]]
    table: list[str]

    def of(self, case: str, arch: int) -> dict[str, Any]:
        """The one kernel of a case."""
        (found,) = (each for each in self.resources if (each["case"], each["arch"]) == (case, arch))
        return found

    def broken_by(self, case: str, arch: int) -> set[str]:
        """The names of the limits that a case breaks."""
        lines = (line.split(" / ") for line in self.broken)
        return {text.split(":")[0] for name, _, on, text in lines if (name, on) == (case, f"sm_{arch}")}


def compile_cases(folder: Path, *command: str) -> Compiled:
    """Run a command in the repository's root, with nothing of this process's Triton, and read what it wrote.

    By the environment's default no a * b + c would be one FMA, as in a later Triton: launches say what they want.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "0"}
    out = folder / "resources.json"
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stderr
    lines = [line for line in done.stderr.splitlines() if " / sm_" in line]
    return Compiled(done.returncode, lines, json.loads(out.read_text()), done.stdout.splitlines())


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Our kernels, compiled."""
    return compile_cases(tmp_path_factory.mktemp("kernels"), "-m", "bench.kernel_resources")


FEW = [f"{name} / DiT-XL/2 256 px, B=1, bfloat16" for name in ("2 residuals, norm", "head, DDPM")]


def test_a_few_kernels_keep_to_their_limits(tmp_path: Path) -> None:
    """On the oldest architecture and a new one; the rest is slow."""
    few = compile_cases(tmp_path, "-m", "bench.kernel_resources", "--arch", "80", "100", "--only", *FEW)
    assert (few.status, few.broken) == (0, [])
    assert sorted((each["case"], each["arch"]) for each in few.resources) == sorted(product(FEW, (80, 100)))
    assert all(each["fuses"] and each["shared_bytes"] <= each["shared_bound"] for each in few.resources)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_keep_to_their_limits(kernels: Compiled, arch: int) -> None:
    broken = [line for line in kernels.broken if f" / sm_{arch} / " in line]
    assert not broken, "\n".join(broken)


@pytest.mark.slow
def test_every_case_is_compiled_for_every_arch(kernels: Compiled) -> None:
    assert kernels.status == (1 if kernels.broken else 0)
    compiled: dict[str, set[int]] = {}
    for each in kernels.resources:
        compiled.setdefault(each["case"], set()).add(each["arch"])
    assert all(archs == {90, 100} for case, archs in compiled.items() if case.endswith("early"))
    for name in CALLS:  # in one dtype or another; those with a memory in one alone
        of_call = (archs for case, archs in compiled.items() if case.startswith(f"{name} / "))
        missing = set(ARCHS).difference(*of_call)
        assert missing == ({80, 86} if "float8" in name else {89} if name in WITH_MEMORY else set()), name


@pytest.mark.slow
def test_every_launcher_knows_how_much_shared_memory_its_kernel_takes_at_most(kernels: Compiled) -> None:
    """So that what does not fit a card is not launched there; that each bound holds is one of the limits."""
    assert all(each["shared_bytes"] <= each["shared_bound"] <= SHARED[each["arch"]] for each in kernels.resources)


@pytest.mark.slow
def test_the_environment_does_not_decide_what_is_fused(kernels: Compiled) -> None:
    assert all(each["fuses"] for each in kernels.resources)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_float8_costs_a_row_of_the_stream_hardly_a_register(kernels: Compiled, arch: int) -> None:
    size = "DiT-XL/2 256 px, B=1, bfloat16"
    plain, float8 = (kernels.of(f"{name} / {size}", arch) for name in ("residual, norm", "residual, norm, float8"))
    assert float8["registers"] <= plain["registers"] + 8
    assert float8["warps"] == plain["warps"]


# Kernels that keep or break each limit, to see that the harness reads them right.


@triton.jit
def _copy(x, y, width, BLOCK: tl.constexpr):
    """Copy a row a program."""
    at = tl.program_id(0) * width + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, tl.arange(0, BLOCK) < width), tl.arange(0, BLOCK) < width)


@triton.jit
def _copy_early(x, y, width, launch_pdl: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a row a program, launched before whatever wrote the row has ended."""
    begin(launch_pdl)
    at = tl.program_id(0) * width + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, tl.arange(0, BLOCK) < width), tl.arange(0, BLOCK) < width)


@triton.jit
def _copy_described(x, y, rows, width, BLOCK: tl.constexpr):
    """Copy 16 rows a program by a descriptor made here, which needs scratch in global memory."""
    source = tl.make_tensor_descriptor(x, [rows, width], [width, 1], [16, BLOCK])
    target = tl.make_tensor_descriptor(y, [rows, width], [width, 1], [16, BLOCK])
    target.store([tl.program_id(0) * 16, 0], source.load([tl.program_id(0) * 16, 0]))


@triton.jit
def _multiply(x, y, z, width, BLOCK: tl.constexpr):
    """A tile of the sum of three products, each with an accumulator of its own."""
    rows, cols, inner = tl.arange(0, 128), tl.arange(0, BLOCK), tl.arange(0, 32)
    one = tl.zeros((128, BLOCK), tl.float32)
    two, three = one, one
    for k in range(0, width, 32):
        left = tl.load(x + rows[:, None] * width + inner + k)
        right = tl.load(y + (inner[:, None] + k) * width + cols)
        one, two, three = tl.dot(left, right, one), tl.dot(left * 2, right, two), tl.dot(left * 3, right, three)
    tl.store(z + rows[:, None] * width + cols, one * two + three)


def matrix(device: torch.device, *shape: int) -> Tensor:
    """What the kernels below read and write."""
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


def copy(device: torch.device) -> None:
    """Loads 128 bit, and fuses; the number of warps tells which architecture the launcher was told."""
    warps = {80: 2, 90: 4, 100: 8}[launch.arch_of(device)]
    for rows in (512, 1024):  # two launches, one kernel
        _copy[(rows,)](matrix(device, rows, 1152), matrix(device, rows, 1152), 1152, 2048, num_warps=warps, **OPTIONS)


def copy_early(device: torch.device) -> None:
    """Waits ahead of its loads."""
    _copy_early[(512,)](
        matrix(device, 512, 1152), matrix(device, 512, 1152), 1152, launch_pdl=True, BLOCK=2048, **OPTIONS
    )


def copy_slice(device: torch.device) -> None:
    """Rows that begin one element behind a multiple of 16 bytes: loads element by element. Leaves fusing to others."""
    _copy[(512,)](matrix(device, 512 * 1152 + 1)[1:], matrix(device, 512, 1152), 1152, 2048)


def copy_crammed(device: torch.device) -> None:
    """Far more values than registers."""
    _copy[(512,)](matrix(device, 512, 16384), matrix(device, 512, 16384), 16384, 16384, maxnreg=24, **OPTIONS)


def copy_described(device: torch.device) -> None:
    """Loads by TMA where there is one, and its descriptors lie in global scratch."""
    _copy_described[(32,)](matrix(device, 512, 256), matrix(device, 512, 256), 512, 256, 256, **OPTIONS)


def multiply(device: torch.device) -> None:
    """A modest product."""
    _multiply[(1,)](
        matrix(device, 128, 1024), matrix(device, 1024, 1024), matrix(device, 128, 1024), 1024, 32, **OPTIONS
    )


def multiply_greedily(device: torch.device) -> None:
    """More tiles in flight than shared memory holds; on sm_100 more sums than tensor memory, so the code is a stub."""
    block = {80: 32, 90: 32, 100: 256}[launch.arch_of(device)]
    x, y, z = matrix(device, 128, 1024), matrix(device, 1024, 1024), matrix(device, 128, 1024)
    _multiply[(1,)](x, y, z, 1024, block, num_stages=24, **OPTIONS)


def compile_toys() -> int:
    """Run the command on the kernels above, in a process that can import bench; see that it leaves no trace."""
    from bench.kernel_cases import Case
    from bench.kernel_resources import main

    cases = (
        Case("copy", copy, most_narrow_loads=0),
        Case("copy_early", copy_early, waits=True, archs=(90, 100)),
        Case("copy_slice", copy_slice, most_narrow_loads=15, wgmma=True, tma=True, waits=True),
        Case("copy_crammed", copy_crammed),
        Case("copy_described", copy_described, tma=True, vectorised=False),
        Case("multiply", multiply, wgmma=True),
        Case("multiply_greedily", multiply_greedily, vectorised=False),
    )
    run, arch_of = triton.JITFunction.run, launch.arch_of
    status = main(cases)
    assert (triton.JITFunction.run, launch.arch_of) == (run, arch_of)
    return status


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The kernels above, compiled."""
    program = "import sys, test_kernel_compiles as toys; sys.exit(toys.compile_toys())"
    return compile_cases(tmp_path_factory.mktemp("toys"), "-c", program)


BROKEN: Mapping[str, Mapping[int, set[str]]] = {
    "copy": {80: set(), 90: set(), 100: set()},
    "copy_early": {90: set(), 100: set()},
    "copy_slice": {
        80: {"widest load", "narrow loads", "matrix unit", "wait", "fusion"},
        90: {"widest load", "narrow loads", "matrix unit", "TMA", "wait", "fusion"},
        100: {"widest load", "narrow loads", "matrix unit", "TMA", "wait", "fusion"},
    },
    "copy_crammed": {arch: {"spills", "stack"} for arch in TOY_ARCHS},
    "copy_described": {80: set(), 90: {"global scratch"}, 100: {"global scratch"}},
    "multiply": {80: set(), 90: set(), 100: set()},
    "multiply_greedily": {80: {"shared memory"}, 90: {"shared memory"}, 100: {"shared memory", "tensor memory"}},
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "arch"), [(case, arch) for case, archs in BROKEN.items() for arch in archs])
def test_each_limit_that_breaks_is_named(toys: Compiled, case: str, arch: int) -> None:
    assert toys.broken_by(case, arch) == BROKEN[case][arch]
    assert toys.status == 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", TOY_ARCHS)
def test_resources_are_read_off_the_binary(toys: Compiled, arch: int) -> None:
    copy, crammed = toys.of("copy", arch), toys.of("copy_crammed", arch)
    assert copy["widest_load_bits"] == 128
    assert copy["narrow_loads"] == 0
    assert toys.of("copy_slice", arch)["widest_load_bits"] == 16
    assert copy["warps"] == {80: 2, 90: 4, 100: 8}[arch]
    assert 0 < copy["registers"] <= 64
    assert crammed["registers"] == 24
    assert crammed["spill_bytes"] > crammed["stack_bytes"] > 256
    assert 10 < copy["instructions"] < 200 < crammed["instructions"]
    assert toys.of("multiply", arch)["matrix_unit"] == {80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]
    assert copy["matrix_unit"] == ""


@pytest.mark.slow
def test_the_table_has_a_line_for_each_kernel(toys: Compiled) -> None:
    """All in the order of the JSON: by case, then architecture."""
    keys = [(each["case"], each["arch"]) for each in toys.resources]
    assert keys == sorted((case, arch) for case, archs in BROKEN.items() for arch in archs)
    assert [line.split(" | ")[0].removeprefix("| ") for line in toys.table[2:]] == [case for case, _ in keys]
