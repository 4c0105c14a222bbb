"""Each kernel's call beside what else computes the same: what it must do, whether it is right, and how long it takes.

A call is taken from `bench.kernel_cases.CALLS` as data, so that every contender gets the very same operands.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import kernel_cases
from bench.kernel_operands import KernelOperands, ModelSizes
from ebcache_fast.engine.graphs import CudaGraphs, Graph
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops import reference

TINY = ModelSizes("tiny", side=4, channels=3, patch=2, width=32, hidden=64, heads=2, slots=2)  # for an interpreter

Run = Callable[..., object]
Round = Callable[[], float]  # runs a contender for a while -> seconds a call


@dataclass(frozen=True)
class BoundCall:
    """An operation's name, the same in kernels and reference, and its arguments."""

    operation: str
    arguments: tuple[Any, ...]


def bound(kernel: str, operands: KernelOperands) -> BoundCall:
    """What ``CALLS[kernel]`` would call, not called."""
    calls: list[BoundCall] = []

    def note(operation: str, *arguments: Any) -> None:
        calls.append(BoundCall(operation, arguments))

    operations = ops.own_matmul_operations().implementations()
    launchers = {name: partial(note, name) for name in operations if hasattr(kernel_cases, name)}
    with patch.multiple(kernel_cases, **launchers):
        kernel_cases.CALLS[kernel](operands)
    (call,) = calls
    return call


@dataclass(frozen=True)
class Work:
    """The least that a call must do."""

    bytes: int  # of device memory: each operand that it needs once, in and out, tables at the steps at hand alone
    flops: int  # of its matrix products, 2 a multiply-add: all else is free beside the memory it comes with


def work(kernel: str, model: ModelSizes, samples: int, itemsize: int) -> Work:
    """The work of ``CALLS[kernel]`` for a guided batch of ``samples``, with ``itemsize`` bytes a channel."""
    rows, T, D = 2 * samples, model.tokens, model.width
    stream = rows * T * D * itemsize  # h, u, a branch, a cache slot, a sum
    table = (samples + 1) * D * itemsize  # a gate, shift or scale at one step: each sample's condition, and null
    latents = samples * model.channels * model.side**2 * 4  # x, or the noise of a step
    patch = model.channels * model.patch**2  # latents a token: as many eps features, and as many of the variance
    embedding = (D * patch + D + T * D) * itemsize  # weight, bias, positions
    eps_map = (D + 1) * patch * itemsize  # the head's weight and bias, the half that makes eps
    into = 2 * samples * T * patch * D  # embed: rows of a sample share their tokens
    eps_out = 2 * rows * T * D * patch  # the head's eps half
    M, hidden, chosen = rows * T, model.hidden, rows * -(-T // 4)
    reach = T // 4
    pairs = T + 2 * sum(range(T - reach, T))  # of a token and one that it sees: itself, and those on either side
    table_of_work = {
        "residual": (4 * stream + 2 * table, 0),  # h in and out, 2 branches; their gates
        "residual, norm": (4 * stream + 3 * table, 0),  # h in and out, branch, u; gate, shift, scale
        "2 residuals, norm": (5 * stream + 4 * table, 0),  # one branch and its gate more
        "norm": (2 * stream + 2 * table, 0),  # h in, u out; shift, scale
        # u in bytes, a scale a token
        "residual, norm, float8": (3 * stream + stream // itemsize + 4 * rows * T + 3 * table, 0),
        "sum for 1 step": ((model.slots + 2) * stream + model.slots * table, 0),  # slots, base, sum; gates
        "sum for 2 steps": ((model.slots + 2) * stream + 2 * model.slots * table, 0),  # slots, 2 sums; gates of 2 steps
        "sum for 3 steps": ((model.slots + 3) * stream + 3 * model.slots * table, 0),
        "embed": (latents + embedding + stream, into),  # h out
        "embed, norm": (latents + embedding + 2 * stream + 2 * table, into),  # h and u out; shift, scale
        # h, its last branch; gate, shift, scale; the whole map; eps and variance of both rows out
        "head": (2 * stream + 3 * table + 2 * eps_map + 4 * latents, 2 * eps_out),
        "head, DDPM": (2 * stream + 3 * table + 2 * eps_map + 3 * latents, 2 * eps_out),  # x in and out, noise
        "head, DDIM": (2 * stream + 3 * table + eps_map + 2 * latents, eps_out),  # without noise no variance either
        # the same, and what is kept of the step, in and out
        "head, DPM-Solver++": (2 * stream + 3 * table + eps_map + 4 * latents, eps_out),
        # 3 sums, shift and scale of 3 steps, both maps once, x in and out, 3 steps' noise
        "run of 3 steps": (3 * stream + 6 * table + embedding + 2 * eps_map + 5 * latents, 3 * (into + 2 * eps_out)),
        # without noise and variance; what is kept, in and out
        "run of 3 steps, DPM-Solver++": (
            3 * stream + 6 * table + embedding + eps_map + 4 * latents,
            3 * (into + eps_out),
        ),
        "gather": (2 * chosen * D * itemsize + 4 * chosen, 0),  # chosen tokens in and out, their indices
        "scatter": (2 * chosen * D * itemsize + 4 * chosen, 0),
        "linear, GELU": ((M * (D + hidden) + (D + 1) * hidden) * itemsize, 2 * M * D * hidden),  # u, out, weight, bias
        "attention": (4 * stream, 4 * rows * T**2 * D),  # q, k, v, out; scores, weighted sum
        "window attention": (4 * stream, 4 * rows * pairs * D),  # the same of the pairs in the window
    }
    return Work(*table_of_work[kernel])


def _sdpa(backend: SDPBackend, qkv: Tensor, heads: int, out: Tensor) -> Tensor:
    """One of torch's attentions; what it returns stays where it is, as a model would read it there."""
    rows, tokens, width = out.shape
    q, k, v = qkv.view(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # (R, heads, T, D / heads)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _compiled(operation: str) -> Run:
    torch.compiler.reset()  # one shape's guards would make the next one dynamic
    return torch.compile(getattr(reference, operation), mode="max-autotune-no-cudagraphs", dynamic=False)


EAGER, COMPILED = "torch eager", "torch.compile"
CONTENDERS: Mapping[str, Callable[[str], Run]] = {
    "Triton": lambda operation: getattr(ops.own_matmul_operations(), operation),
    EAGER: lambda operation: getattr(reference, operation),
    COMPILED: _compiled,
    "cuBLASLt": lambda operation: getattr(ops.triton_operations(), operation),
    "cuDNN": lambda operation: partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "flash": lambda operation: partial(_sdpa, SDPBackend.FLASH_ATTENTION),
}
LIBRARY = {"linear, GELU": ("cuBLASLt",), "attention": ("cuDNN", "flash")}


def contenders_of(kernel: str, device: torch.device) -> tuple[str, ...]:
    """Who competes: on a CPU, where nothing is claimed, the reference alone."""
    return ("Triton", EAGER, COMPILED, *LIBRARY.get(kernel, ())) if device.type == "cuda" else (EAGER,)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples and lists of operands with every floating tensor changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(changed(one, change) for one in value))
    return type(value)(changed(one, change) for one in value) if isinstance(value, tuple | list) else value


def leaves(value: Any) -> list[Tensor]:
    """The floating tensors in nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [leaf for one in value for leaf in leaves(one)] if isinstance(value, tuple | list) else []


class Judge:
    """Knows what a call must come to, and which error is allowed: the rule of accuracy. Operands stay as they were.

    Against float64 an error of at most twice torch's own in the same dtype, plus 2 ulp of the largest value.
    """

    def __init__(self, call: BoundCall) -> None:
        self._call = call
        run = getattr(reference, call.operation)
        exact, own = (changed(call.arguments, change) for change in (Tensor.double, Tensor.clone))
        run(*exact)
        run(*own)
        # Of what the call does not write, both copies are equal, and so must the kernel's be.
        self._exact = leaves(exact)
        self._allowed = [2 * error(a, b) + 2 * ulp(b, a.dtype) for a, b in zip(leaves(own), self._exact, strict=True)]

    def objection(self) -> str | None:
        """Why the kernel's result, as launched now, is wrong; None if it is right."""
        arguments = changed(self._call.arguments, Tensor.clone)
        getattr(ops.own_matmul_operations(), self._call.operation)(*arguments)
        for got, exact, allowed in zip(leaves(arguments), self._exact, self._allowed, strict=True):
            if not error(got, exact) <= allowed:  # NaN is no less
                return f"{self._call.operation} is wrong by {error(got, exact):.3g}, at most {allowed:.3g} is allowed"
        return None


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


def ulp(values: Tensor, dtype: torch.dtype) -> float:
    """The spacing of ``dtype`` at the largest magnitude among ``values``."""
    largest = float(values.abs().max())
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0


L2_TIMES = 2  # how much larger than the L2 cache the operands in rotation are, at least
ROUND_SECONDS = 2e-3  # of device work in a round, at least, so that its start does not count
GRAPH_CALLS = 100  # of short calls in a graph, so that the start of each replay does not count either


def timer(run: Run, calls: Sequence[BoundCall], device: torch.device) -> Round:
    """Rounds of ``run`` over the arguments of all calls in turn, by device time on a GPU."""
    if device.type == "cuda":
        return _graph_timer(run, calls)
    _host_round(run, calls)  # the first one learns what to do
    return partial(_host_round, run, calls)


def _host_round(run: Run, calls: Sequence[BoundCall]) -> float:
    start = time.perf_counter()
    for call in calls:
        run(*call.arguments)
    return (time.perf_counter() - start) / len(calls)


def _graph_timer(run: Run, calls: Sequence[BoundCall]) -> Round:
    """Events around replays of a CUDA graph, which is how the engine launches: gaps in it count, the host's do not."""
    for call in calls:  # compiles and plans every specialisation before the capture
        run(*call.arguments)
    start = _mark()
    for call in calls:
        run(*call.arguments)
    end = _mark()
    turns = max(1, math.ceil(min(GRAPH_CALLS / len(calls), ROUND_SECONDS / _between(start, end))))

    def body() -> None:
        for call in list(calls) * turns:
            run(*call.arguments)

    graph = CudaGraphs(torch.device("cuda", torch.cuda.current_device())).capture(body, ())
    _replays(graph, 1)  # the first one uploads it
    replays = math.ceil(ROUND_SECONDS / _replays(graph, 1))
    return lambda: _replays(graph, replays) / (replays * turns * len(calls))


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Device seconds, once both have happened; never 0."""
    end.synchronize()
    return max(start.elapsed_time(end), 1e-3) / 1e3


def _replays(graph: Graph, count: int) -> float:
    start = _mark()
    for _ in range(count):
        graph.replay()
    return _between(start, _mark())


def rotation(call_bytes: int, device: torch.device) -> int:
    """How many sets of operands to use in turn, so that none is in the L2 cache when it comes round again."""
    if device.type != "cuda":
        return 1
    return max(1, math.ceil(L2_TIMES * torch.cuda.get_device_properties(device).L2_cache_size / call_bytes))


def interleaved(rounds: int, timers: Mapping[str, Round]) -> dict[str, list[float]]:
    """Seconds a call of every contender, one round after another in turn, so that all share the machine's moments."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, one_round in timers.items():
            seconds[name].append(one_round())
    return seconds
