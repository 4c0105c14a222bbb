"""Names and times for what an engine runs: by type of step, by layer, by operation. Without a profiled run, nothing.

A CUDA graph replays without Python, so under graphs the only ranges are those around each dispatch; an eager run has
one around each layer's branch and each fused operation as well.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import MappingProxyType
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor, nn

from ebcache_fast.apps.timeline import Span
from ebcache_fast.engine.buffer_set import BufferSet, Dispatches, Executable
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import Graphs, cuda_graphs
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.models import Denoiser, as_denoiser
from ebcache_fast.models.base import BranchResources, BufferPool, Conditioning, Modulation
from ebcache_fast.ops.operations import Operations
from ebcache_fast.plan import Branch, Site
from ebcache_fast.plan.files import replacing

Around = Callable[[str], AbstractContextManager[object]]  # a range of this name

GROUPS: Final = MappingProxyType(
    {
        "embed": "embedding",
        "embed_norm_modulate": "embedding",
        "head_predict": "head",
        "head_update": "head",
    }
)
BRANCHES: Final = MappingProxyType(
    {Branch.SELF_ATTN: "attention", Branch.CROSS_ATTN: "cross-attention", Branch.MLP: "MLP"}
)


@dataclass
class Probe:
    """Hooks around the parts of a run: none, unless they are set between two runs."""

    around: Around = nullcontext  # dispatches, layers and operations, by name
    watch: Callable[[Executable], AbstractContextManager[object]] = nullcontext  # dispatches, within their range


class ProfiledEngine(Engine):
    """An Engine whose dispatches, layers and operations a probe can watch; results are the same.

    Ranges are named by the type of step, such as ``ATTN_MLP``, by the layer's part, such as ``layer 3 attention``,
    counted from 0, and by the operation, such as ``gated_sum``.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        options: EngineOptions | None = None,
        operations: Operations | None = None,
        make_graphs: Callable[[torch.device], Graphs | None] = cuda_graphs,
    ) -> None:
        self._probe = probe
        super().__init__(model, options, operations, make_graphs, self._annotated_denoiser)

    @property
    def operations(self) -> Operations:
        """The fused operations, each in a range of its name."""
        return annotated(super().operations, self._around)

    def _prepare(self, buffer_set: BufferSet, batches: Sequence[Dispatches]) -> list[Executable]:
        return [replace(ready, run=partial(self._dispatch, ready)) for ready in super()._prepare(buffer_set, batches)]

    def _dispatch(self, executable: Executable) -> None:
        names = set(executable.names)
        with self._around(names.pop() if len(names) == 1 else "trajectory"), self._probe.watch(executable):
            executable.run()

    def _annotated_denoiser(self, model: nn.Module) -> Denoiser:
        return cast(Denoiser, _AnnotatedDenoiser(as_denoiser(model), self._around))

    def _around(self, name: str) -> AbstractContextManager[object]:
        return self._probe.around(name)


def annotated(operations: Operations, around: Around) -> Operations:
    """Wrap each operation in a range of its name, those of a step's ends in one of theirs too."""
    found = ((field.name, getattr(operations, field.name)) for field in fields(operations) if field.name != "name")
    within = {
        name: partial(_call_within, around, (GROUPS[name], name) if name in GROUPS else (name,), operation)
        for name, operation in found
        if operation is not None
    }
    return replace(operations, **cast(Any, within))


def _call_within(around: Around, names: Sequence[str], operation: Callable[..., None], *args: Any) -> None:
    with ExitStack() as ranges:
        for name in names:
            ranges.enter_context(around(name))
        operation(*args)


class _AnnotatedDenoiser:
    """A Denoiser whose parts run in ranges of their names."""

    def __init__(self, denoiser: Denoiser, around: Around) -> None:
        self._denoiser, self._around = denoiser, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> "_AnnotatedDenoiser":
        return _AnnotatedDenoiser(self._denoiser.for_shape(latents, context), self._around)

    def modulation(self, t: Tensor, y: Tensor, context: Conditioning, out: Modulation) -> None:
        with self._around("modulation"):
            self._denoiser.modulation(t, y, context, out)

    def embed(self, x: Tensor, per_run: BufferPool) -> Tensor:
        with self._around("embedding"):
            return self._denoiser.embed(x, per_run)

    def head(self, u: Tensor) -> Tensor:
        with self._around("head"):
            return self._denoiser.head(u)

    def branch(self, site: Site, u: Tensor, out: Tensor, res: BranchResources) -> None:
        with self._around(f"layer {site.layer} {BRANCHES[site.branch]}"):
            self._denoiser.branch(site, u, out, res)


@dataclass
class Recorder:
    """Ranges as a list of names, each after those that it lies in: ``NO_CACHE / embedding / embed``."""

    paths: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self.paths.append(" / ".join(self._open))
        try:
            yield
        finally:
            self._open.pop()


class Event(Protocol):
    """A moment, as torch.cuda.Event has it."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this event to ``end``, once both are over."""
        ...


class HostEvent:
    """A moment on the host."""

    def __init__(self) -> None:
        self._at = perf_counter()

    def elapsed_time(self, end: "HostEvent", /) -> float:
        return 1e3 * (end._at - self._at)


class Stopwatch:
    """Times dispatches: by events in a CUDA device's stream, on any other by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._now: Callable[[], Event] = partial(_cuda_event, device) if device.type == "cuda" else HostEvent
        self._seen: list[tuple[Executable, Event, Event]] = []

    @contextmanager
    def __call__(self, executable: Executable) -> Iterator[None]:
        begin = self._now()
        yield
        self._seen.append((executable, begin, self._now()))

    def spans(self) -> tuple[Span, ...]:
        """The timed spans, in milliseconds, once the device is done."""
        return tuple(
            Span(
                executable.names,
                start=self._seen[0][1].elapsed_time(begin),
                cost=begin.elapsed_time(end),
                replayed=executable.ran.why_eager is None,
            )
            for executable, begin, end in self._seen
        )


def _cuda_event(device: torch.device) -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def time_run(run: Callable[[], object], probe: Probe, device: torch.device) -> tuple[Span, ...]:
    """Time the dispatches of one run; on a GPU with NVTX ranges, between cudaProfilerStart and Stop."""
    watch, on_gpu = Stopwatch(device), device.type == "cuda"
    probe.around, probe.watch = cast(Around, torch.cuda.nvtx.range) if on_gpu else nullcontext, watch
    _wait_for(device)
    try:
        with torch.cuda.profiler.profile() if on_gpu else nullcontext():
            run()
            _wait_for(device)
    finally:
        probe.around, probe.watch = nullcontext, nullcontext
    return watch.spans()


def trace_run(run: Callable[[], object], probe: Probe, device: torch.device, path: Path) -> None:
    """Write what torch.profiler sees of one run, the ranges among it, as a Chrome trace; JobError if it can't be."""
    from torch.profiler import ProfilerActivity, profile, record_function

    probe.around = record_function
    try:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * (device.type == "cuda"))]) as seen:
            run()
            _wait_for(device)
    finally:
        probe.around = nullcontext
    # A trace says its own file's name, and the profiler takes no backslash in it: it is made elsewhere, then renamed.
    with replacing(path) as partial_file, TemporaryDirectory() as folder:
        export = Path(folder, "trace.json")
        seen.export_chrome_trace(str(export))
        trace = export.read_bytes()
        if not trace.rstrip().endswith(b"}"):
            raise OSError("the profiler could not write all of it")  # which it only logs
        partial_file.write_bytes(trace.replace(json.dumps(str(export)).encode(), json.dumps(str(path)).encode()))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
