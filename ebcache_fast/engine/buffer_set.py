"""A buffer set: a trajectory's static memory, the steps over it, and the graphs captured of them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ebcache_fast.engine.buffers import BufferSpec, allocate
from ebcache_fast.engine.flags import Flags
from ebcache_fast.engine.graphs import Graph, Graphs
from ebcache_fast.engine.runner import Runner
from ebcache_fast.engine.stats import Counts, Ran
from ebcache_fast.engine.step_scheduler import Dispatch
from ebcache_fast.engine.stream_order import StreamOrder
from ebcache_fast.errors import CaptureError, InputError
from ebcache_fast.models.base import Conditioning, Denoiser
from ebcache_fast.models.float8 import Float8Branches
from ebcache_fast.models.layers import tensors_of
from ebcache_fast.ops.operations import Operations
from ebcache_fast.plan import Plan, Program, lower

Dispatches = tuple[Dispatch, ...]  # what is run at once: a dispatch, or a whole trajectory of them
Programs = tuple[Program, ...]  # the same for this memory and this model: what a graph is known by


@dataclass(frozen=True)
class Executable:
    """Runnable work: all that is left to do for it is a call."""

    run: Callable[[], None]
    run_eagerly: Callable[[], None]
    ran: Ran  # what is counted once it did

    @property
    def names(self) -> tuple[str, ...]:
        """Type names of its steps, in order."""
        return self.ran.names


class BufferSet:
    """Runs work over its memory: by a graph where there is one, else operation by operation.

    One trajectory at a time leases it. Its graphs are of the weights as they lay when it was made.
    """

    def __init__(
        self,
        spec: BufferSpec,
        model: nn.Module,
        denoiser: Denoiser,
        operations: Operations,
        graphs: Graphs | None,
        why_no_graphs: str,
        counts: Counts,
    ) -> None:
        self.spec = spec
        self.buffers = buffers = allocate(spec, denoiser)
        self._float8 = Float8Branches(model, buffers.per_run) if spec.float8 else None
        self._runner = Runner(
            denoiser, operations, buffers.modulation, buffers.guide, buffers.workspace, buffers.per_run, self._float8
        )
        self._model, self._denoiser, self._counts = model, denoiser, counts
        self._backend, self._why_no_graphs = graphs, why_no_graphs
        self._graphs: dict[Programs, Graph] = {}
        self._refused: dict[Programs, str] = {}
        self._lowered: dict[tuple[Dispatch, frozenset[int]], Program] = {}
        clock = self._runner.clock
        # Whoever touches the memory joins it first.
        self.streams = StreamOrder(buffers.x.device, lambda: chain(buffers.tensors, clock.tensors))
        self._strict = False
        self._samples = spec.tail.update  # else it hands outputs out
        self._next_step: int | None = None  # what the clock on the device says, if that is known

    @property
    def graphs(self) -> int:
        """Number of graphs captured over this memory."""
        return len(self._graphs)

    @torch.no_grad()
    def prepare(self, batches: Sequence[Dispatches], room: int, *, strict: bool) -> list[Executable]:
        """Make all work ready to run; up to ``room`` graphs are captured, which spoils what the memory holds.

        What can't be captured will run eagerly, and is counted; CaptureError instead if ``strict``.
        """
        self._strict = strict
        float8 = frozenset[int]() if self._float8 is None else self._float8.sites
        lowered = {work: tuple(self._lower(dispatch, float8) for dispatch in work) for work in dict.fromkeys(batches)}
        for programs in lowered.values():
            if programs not in self._graphs and programs not in self._refused:
                self._capture(programs, room, strict=strict)
                room -= programs in self._graphs
        executable = {work: self._executable(work, programs) for work, programs in lowered.items()}
        return [executable[work] for work in batches]

    @torch.no_grad()
    def set_conditioning(self, context: Conditioning) -> None:
        """Make ready for runs in this context; before anything is captured that reads what it says."""
        self.streams.join()
        try:
            self._denoiser.precompute(context, self.buffers.per_run)
            if self._float8 is not None:
                self._float8.prepare()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{self.buffers.x.device} has too little memory for what the steps of a run share "
                f"({str(error).splitlines()[0]}); sample fewer at once"
            ) from error

    def load(self, plan: Plan, row_labels: Tensor, context: Conditioning, scale: float) -> None:
        """Make ready for a run under ``plan`` over rows of these labels (R,), guided by ``scale``."""
        buffers = self.buffers
        buffers.modulation.load(plan.timesteps, row_labels, context, plan.factors)
        settings = buffers.guide.settings
        settings.copy_(torch.tensor([scale, plan.eps_scale], dtype=settings.dtype, device="cpu"))
        if self.spec.tail.guarded:
            buffers.guard.load(plan.timesteps, row_labels)

    @torch.no_grad()
    def recompute(self, step: int, t: float) -> None:
        """Compute anew what the step at timestep ``t`` shares with others, for hooks that may say another thing now."""
        modulation = self.buffers.modulation
        self.set_conditioning(modulation.context)
        modulation.load_row(step, t)

    def as_of_now(self, executable: Executable) -> Executable:
        """Return it as it is, or eager if its graph was captured under other settings or functions of torch than now's.

        CaptureError instead if strict.
        """
        if executable.ran.why_eager is not None or Flags.now(self.buffers.x.device) == self.spec.flags:
            return executable
        why = "torch's settings or functions changed within a run"
        if self._strict:
            raise CaptureError(f"{why}, which its graphs don't follow; strict=False runs its steps eagerly from there")
        return replace(executable, run=executable.run_eagerly, ran=executable.ran._replace(why_eager=why))

    def run(self, executable: Executable, step: int) -> None:
        """Run work of which ``step`` is the first; its caller has joined `streams`."""
        if step != self._next_step:
            self._runner.clock.set(step)
        self._next_step = None  # unless all goes well
        executable.run()
        self._next_step = step + len(executable.ran.names)
        self._counts.ran[executable.ran] += 1

    def _lower(self, dispatch: Dispatch, float8: frozenset[int]) -> Program:
        if (known := self._lowered.get((dispatch, float8))) is not None:
            return known
        self._lowered[dispatch, float8] = program = lower(
            dispatch.plan,
            self._denoiser.shape.site_shapes,
            self.spec.memory,
            samples=self._samples,
            steps=dispatch.steps,
            float8=float8,
            tokens=self._denoiser.shape.tokens,
            is_guided=self.spec.copies == 2,
        )
        return program

    def _capture(self, programs: Programs, room: int, *, strict: bool) -> None:
        if self._backend is None:
            self._refused[programs] = self._why_no_graphs
            return
        if room <= 0:
            self._refuse(programs, "the limit of graphs was reached; raise max_graphs", None, strict=strict)
            return
        self._next_step = None
        body = partial(self._execute, programs)
        try:
            self._runner.clock.set(0)
            body()  # allocates the workspace, compiles the kernels
            self._runner.clock.set(0)
            static = [*self.buffers.tensors, *self._runner.clock.tensors, *tensors_of(self._model)]
            self._graphs[programs] = self._backend.capture(body, static)
        except CaptureError:  # of kernels that can't be launched, where that may not be
            raise
        except Exception as error:  # whatever a driver, a library or somebody's hook may raise
            self._refuse(programs, f"capture failed with {type(error).__name__}", error, strict=strict)

    def _refuse(self, programs: Programs, why: str, error: Exception | None, *, strict: bool) -> None:
        if strict:
            raise CaptureError(f"a step is no CUDA graph: {why} ({error}); strict=False runs it eagerly") from error
        if why not in self._counts.reported:
            self._counts.reported.add(why)
            # As text: whoever keeps the record would keep the error, and with it the frames and this memory.
            logging.getLogger(__name__).warning("steps run eagerly, not as a CUDA graph: %s (%s)", why, str(error))
        self._refused[programs] = why

    def _executable(self, work: Dispatches, programs: Programs) -> Executable:
        names = tuple(dispatch.plan.type_name for dispatch in work for _ in range(dispatch.steps))
        hits = sum(program.steps * len(program.reads) for program in programs)
        graph = self._graphs.get(programs)
        execute = partial(self._execute, programs)
        if graph is not None:
            return Executable(graph.replay, execute, Ran(names, hits, None))
        return Executable(execute, execute, Ran(names, hits, self._refused[programs]))

    @torch.no_grad()
    def _execute(self, programs: Programs) -> None:
        buffers, runner = self.buffers, self._runner
        for program in programs:
            if self._samples:
                runner.update(program, buffers.x, buffers.cache, buffers.update)
                continue
            runner.predict(program, buffers.x, buffers.cache, buffers.out)
            if self.spec.tail.guarded:
                buffers.guard.check(runner.clock.now, buffers.out)
