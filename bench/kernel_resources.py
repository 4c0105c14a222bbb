"""What each kernel takes of a GPU, from a compiler alone: registers, spills, shared memory, widths of loads.

    python -m bench.kernel_resources [--arch 80 86 90] [--only NAME ...] [--out bench/results/kernel-resources.json]

Every launch of every case in `bench.kernel_cases` is compiled for each of its architectures, by Triton's own path from
a launch's arguments to a binary, and the binary is read with the disassembler that comes with Triton. It prints a
Markdown table, writes what stands in it with ``--out``, and fails with one line on stderr for each broken limit. No
GPU is needed; TRITON_INTERPRET must not be set, so it runs in a process of its own.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from bench.kernel_cases import CASES, Case
from bench.report.tables import table
from ebcache_fast.kernels import launch


@dataclass(frozen=True)
class Arch:
    """Limits of an architecture, a block's where not said otherwise."""

    shared_bytes: int
    stack_bytes: int  # a thread's: what we allow, no hardware limit
    matrix_unit: str  # its own: what products must use where a case says so
    has_tma: bool


ARCHS = {
    80: Arch(shared_bytes=163 * 1024, stack_bytes=16, matrix_unit="mma", has_tma=False),
    86: Arch(shared_bytes=99 * 1024, stack_bytes=16, matrix_unit="mma", has_tma=False),
    89: Arch(shared_bytes=99 * 1024, stack_bytes=16, matrix_unit="mma", has_tma=False),
    90: Arch(shared_bytes=227 * 1024, stack_bytes=0, matrix_unit="wgmma", has_tma=True),
    100: Arch(shared_bytes=227 * 1024, stack_bytes=0, matrix_unit="tcgen05", has_tma=True),
    120: Arch(shared_bytes=99 * 1024, stack_bytes=0, matrix_unit="mma", has_tma=True),
}
TENSOR_MEMORY_COLUMNS = 512  # of sm_100, 128 rows of 32 bit each
WIDE = 128  # bits: the most that one thread loads at once on sm_80 and sm_90


@dataclass(frozen=True)
class Resources:
    """What one launch compiled to for one architecture."""

    case: str
    kernel: str
    arch: int
    warps: int
    registers: int  # a thread's
    stack_bytes: int  # a thread's
    spill_bytes: int  # stores and loads of local memory, each instruction once: what ptxas -v adds up
    shared_bytes: int
    shared_bound: int | None  # what its launcher took that for at most; None of kernels that are not ours
    tensor_memory_columns: int
    global_scratch_bytes: int
    instructions: int
    widest_load_bits: int  # of global memory, by one thread; 0 without any
    narrow_loads: int  # instructions that load less than 128 bit of global memory
    matrix_unit: str  # "mma", "wgmma", "tcgen05", or "" without products
    uses_tma: bool  # to load
    waits_first: bool  # for the kernel before it, ahead of any access to global memory
    fuses: bool  # a * b + c into one FMA
    triton: str  # its version


@dataclass(frozen=True)
class Instruction:
    """``LDG.E.128`` is the operation LDG with the modifiers E and 128."""

    operation: str
    modifiers: tuple[str, ...]

    @property
    def bits(self) -> int:
        """How much a load or store moves a thread; 32 has no modifier of its own."""
        widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        return next((widths[name] for name in self.modifiers if name in widths), 32)


INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\w+)((?:\.\w+)*)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
MATRIX_UNITS = {"tcgen05": r"UTC\w*MMA", "wgmma": r"[HIQ]GMMA", "mma": r"[HIQD]MMA"}  # the newest first


WAIT = "ACQBULK"  # what griddepcontrol.wait becomes
GLOBAL_ACCESSES = {"LD", "ST", "LDG", "STG", "LDGSTS", "RED", "ATOM", "ATOMG"}


class OfflineDriver:
    """All that Triton asks of a driver up to the binary: devices are numbered by their architecture."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


@contextmanager
def compiled_launches(arch: int) -> Iterator[list[CompiledKernel]]:
    """Within it a launch compiles for ``arch``, runs nothing, and adds its kernel to the list that this yields."""
    run, kernels = triton.JITFunction.run, []

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel:
        kernels.append(run(function, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    with (
        patch.object(triton.JITFunction, "run", compile_only),
        patch("ebcache_fast.kernels.launch.arch_of", lambda device: arch),
    ):
        driver.set_active(OfflineDriver(arch))
        try:
            yield kernels
        finally:
            driver.set_active(None)  # the next to ask finds the machine's own


def compile_case(case: Case, arch: int) -> list[Resources]:
    """Each distinct kernel that a case launches, in order; an error in it names the case and the architecture."""
    with compiled_launches(arch) as kernels, noted_bounds() as bounds:
        try:
            case.launch(torch.device("meta"))
        except Exception as error:
            error.add_note(f"in the case {case.name!r} for sm_{arch}")
            raise
    if not kernels:
        raise RuntimeError(f"the case {case.name!r} launched no kernel on sm_{arch}; let it call a Triton launcher")
    bound_of = dict(zip(kernels, bounds or repeat(None, len(kernels)), strict=True))
    return [measure(case.name, arch, kernel, bound) for kernel, bound in bound_of.items()]


@contextmanager
def noted_bounds() -> Iterator[list[int]]:
    """Within it each launch of ours adds the bound of its shared memory to the list that this yields."""
    bounds, fit = list[int](), launch.fit

    def fit_and_note(chosen: launch.Launch, device: torch.device, shared: Callable[[launch.Launch], int]) -> Any:
        fitting = fit(chosen, device, shared)
        bounds.append(shared(fitting))
        return fitting

    with patch.object(launch, "fit", fit_and_note):
        yield bounds


def measure(case: str, arch: int, kernel: CompiledKernel, bound: int | None) -> Resources:
    """Read a kernel's resources off its binary and what Triton notes beside it."""
    listing = disassemble(kernel.asm["cubin"])
    code = [Instruction(name, tuple(rest.split(".")[1:])) for name, rest in INSTRUCTION.findall(listing)]
    usage = [tuple(map(int, found)) for found in USAGE.findall(listing)]
    operations = {each.operation for each in code}
    loads = [each.bits for each in code if each.operation in {"LDG", "LDGSTS"}]
    units = (unit for unit, name in MATRIX_UNITS.items() if any(re.fullmatch(name, each) for each in operations))
    return Resources(
        case=case,
        kernel=kernel.metadata.name,
        arch=arch,
        warps=kernel.metadata.num_warps,
        registers=max(registers for registers, _ in usage),
        stack_bytes=max(stack for _, stack in usage),
        spill_bytes=sum(each.bits for each in code if each.operation in {"LDL", "STL"}) // 8,
        shared_bytes=kernel.metadata.shared,
        shared_bound=bound,
        tensor_memory_columns=kernel.metadata.tmem_size or 0,
        global_scratch_bytes=kernel.metadata.global_scratch_size or 0,
        instructions=sum(each.operation != "NOP" for each in code),
        widest_load_bits=max(loads, default=0),
        narrow_loads=sum(bits < WIDE for bits in loads),
        matrix_unit=next(units, ""),
        uses_tma="UTMALDG" in operations,
        waits_first=waits_first([each.operation for each in code]),
        fuses=kernel.metadata.enable_fp_fusion,
        triton=triton.__version__,
    )


def waits_first(operations: Sequence[str]) -> bool:
    """Whether code waits for the kernel before it, and reaches no global memory until it has."""
    before = takewhile(lambda operation: operation != WAIT, operations)
    return WAIT in operations and not any(each in GLOBAL_ACCESSES or each.startswith("UTMA") for each in before)


def disassemble(cubin: bytes) -> str:
    """The resource usage and the machine code of each function in a binary, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def violations(case: Case, got: Resources) -> list[str]:
    """One line for each limit that a kernel breaks: what it has, what is allowed, what to look at."""
    arch = ARCHS[got.arch]
    most_narrow = got.narrow_loads if case.most_narrow_loads is None else case.most_narrow_loads
    rules = (
        (got.spill_bytes == 0, f"spills: {got.spill_bytes} B, none allowed; use smaller tiles or more warps"),
        (
            got.stack_bytes <= arch.stack_bytes,
            f"stack: {got.stack_bytes} B, at most {arch.stack_bytes}; use smaller tiles or more warps",
        ),
        (
            got.shared_bytes <= arch.shared_bytes,
            f"shared memory: {got.shared_bytes} B, at most {arch.shared_bytes}; use smaller tiles or fewer stages",
        ),
        (
            got.shared_bound is None or got.shared_bytes <= got.shared_bound,
            f"bound: {got.shared_bytes} B of shared memory, and its launcher takes it for {got.shared_bound} at most",
        ),
        (
            got.tensor_memory_columns <= TENSOR_MEMORY_COLUMNS,
            f"tensor memory: {got.tensor_memory_columns} columns, at most {TENSOR_MEMORY_COLUMNS}; use smaller tiles",
        ),
        (
            got.global_scratch_bytes == 0,
            f"global scratch: {got.global_scratch_bytes} B, none allowed; make descriptors on the host",
        ),
        (
            not case.vectorised or got.uses_tma or got.widest_load_bits >= WIDE,
            f"widest load: {got.widest_load_bits} bit, at least {WIDE}; look at strides and alignments",
        ),
        (
            got.narrow_loads <= most_narrow,
            f"narrow loads: {got.narrow_loads}, at most {most_narrow}; look at strides and alignments",
        ),
        (
            not case.wgmma or got.matrix_unit == arch.matrix_unit,
            f"matrix unit: {got.matrix_unit or 'none'}, {arch.matrix_unit} expected; look at tiles and warps",
        ),
        (not case.waits or got.waits_first, "wait: none ahead of all accesses; call begin first in the kernel"),
        (got.fuses, "fusion: a * b + c is rounded twice; pass launch.OPTIONS"),
        (not case.tma or not arch.has_tma or got.uses_tma, "TMA: no loads, some expected; pass host descriptors"),
    )
    return [f"{case.name} / {got.kernel} / sm_{got.arch} / {text}" for holds, text in rules if not holds]


def main(cases: Sequence[Case] = CASES, argv: Sequence[str] | None = None) -> int:
    """The command; 1 if a limit is broken, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in cases]
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(ARCHS), default=sorted(ARCHS))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="of cases")
    parser.add_argument("--out", type=Path, help="a JSON file, written anew")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels can't be compiled: unset it, in a process of its own")
    chosen = [case for case in cases if case.name in args.only]
    compiled = [(case, arch) for case in chosen for arch in args.arch if arch in case.archs]
    measured = [(case, got) for case, arch in compiled for got in compile_case(case, arch)]
    results = sorted((got for _, got in measured), key=lambda got: (got.case, got.arch, got.kernel))
    head = [field.name.replace("_", " ") for field in fields(Resources)]
    print(table(head, [[str(value) for value in astuple(got)] for got in results]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([asdict(got) for got in results], indent=1) + "\n")
    broken = [line for case, got in measured for line in violations(case, got)]
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
