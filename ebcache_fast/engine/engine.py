"""The engine of one model: it lends trajectories their memory, and keeps the graphs captured over it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ebcache_fast.engine.buffer_set import BufferSet, Dispatches, Executable
from ebcache_fast.engine.buffers import BufferSpec, Tail, room_for
from ebcache_fast.engine.cache import FeatureCache
from ebcache_fast.engine.embed_head import OF_EMBED_HEAD
from ebcache_fast.engine.flags import Flags
from ebcache_fast.engine.graphs import Graphs, cuda_graphs
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.leases import Leases
from ebcache_fast.engine.modulation import count_distinct
from ebcache_fast.engine.module_watch import Watch
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.stats import Counts, Stats
from ebcache_fast.engine.step_scheduler import Dispatch, StepScheduler
from ebcache_fast.engine.trajectory import ForwardTrajectory, Trajectory
from ebcache_fast.errors import CaptureError, InputError
from ebcache_fast.models import Conditioning, Denoiser, as_denoiser
from ebcache_fast.models.float8 import ready_sites
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops.fallback import Fallback
from ebcache_fast.plan import Plan


class Batch(NamedTuple):
    """The rows of a batch; under guidance the unconditional ones follow the conditional ones."""

    row_labels: Tensor  # (R,) int64
    samples: int  # R, or R / 2 under guidance
    guided_channels: int
    latents: tuple[int, ...]  # the shape of one, as the caller has it
    context: Conditioning = ()  # of R rows

    def with_own_context(self) -> Self:
        """Return it with a copy of the context, so that a run keeps no tensor of its caller's alive."""
        make: Any = getattr(type(self.context), "_make", tuple)
        return self._replace(
            context=make(None if tensor is None else tensor.detach().clone() for tensor in self.context)
        )


class Engine:
    """Runs trajectories of ``model``, under any plans for it.

    operations: what runs them; None means what `ops.select` chooses, and torch's where that can't be launched.
    make_graphs: what captures over one set of buffers. make_denoiser: how the model is seen. Threads may share an
    engine: each trajectory has its own memory.
    Raises InputError for options that the model does not allow, also later where it was moved or converted.
    """

    def __init__(
        self,
        model: nn.Module,
        options: EngineOptions | None = None,
        operations: ops.Operations | None = None,
        make_graphs: Callable[[torch.device], Graphs | None] = cuda_graphs,
        make_denoiser: Callable[[nn.Module], Denoiser] = as_denoiser,
    ) -> None:
        self.model, self.options = model, options or EngineOptions()
        self.counts = Counts()
        self._operations, self._make_graphs, self._make_denoiser = operations, make_graphs, make_denoiser
        self._watch = Watch(model)
        self._made_of = self._watch.look()
        self._see()
        self._leases = Leases(self.options)
        self._lock = Lock()

    @property
    def stats(self) -> Stats:
        """Counts of all that ran since this engine was made."""
        return self.counts.snapshot(
            graphs=self._leases.graphs,
            cache_bytes=self._leases.cache_bytes,
            operations=(self._operations or self._selected).implementations() | self._runs_otherwise,
        )

    @contextmanager
    @torch.no_grad()
    def sampling(
        self, plan: Plan, labels: Tensor, guidance: Guidance, rows: Tensor, noise: Tensor, context: Conditioning = ()
    ) -> Iterator[Trajectory]:
        """A run of our own loop over a batch.

        labels: (N,) int64. rows: (S, 6), the sampler's coefficients, or (S, 9) of one with a memory. noise:
        (S + 1, N, C, H, W), of which the first are the initial latents; (1, N, C, H, W) for samplers that draw none.
        On any device, in any float dtype.
        context: what else the model is given, of all batch rows.
        Raises TrajectoryError at the limit of trajectories, InputError for too little memory.
        """
        dispatches = StepScheduler(plan).dispatches()
        batches = [dispatches] if self.options.whole_trajectory else [(dispatch,) for dispatch in dispatches]
        self._follow_the_weights()
        if module := self.denoiser.passed_over_hooks():
            raise InputError(f"{module} has hooks, and no part of the engine calls it; remove them, or hook its layers")
        tail = Tail.of_sampler(rows, noise)
        row_labels = guidance.row_labels(self.denoiser, labels)
        batch = Batch(row_labels, len(labels), guidance.channels, tuple(noise.shape[2:]), context)
        buffer_set = self._lease(plan, batch, tail)
        try:
            buffer_set.set_conditioning(context)
            executable = self._prepare(buffer_set, batches)
            buffer_set.load(plan, row_labels, context, guidance.scale)
            buffer_set.buffers.x.copy_(noise[0])
            update = buffer_set.buffers.update
            update.coefficients.copy_(rows)
            if update.noise is not None:
                update.noise.copy_(noise[1:])
            if update.previous is not None:
                update.previous.zero_()
            trajectory = Trajectory(buffer_set, executable)
            try:
                yield trajectory
            finally:
                trajectory.end()
        finally:
            self.release(buffer_set)

    @torch.no_grad()
    def forward_run(self, plan: Plan, batch: Batch, tail: Tail) -> ForwardTrajectory:
        """A run of somebody else's loop; its ``buffer_set`` must be released. Raises as `sampling` does."""
        self._follow_the_weights()
        buffer_set = self._lease(plan, batch, tail)
        try:
            buffer_set.set_conditioning(batch.context)
            steps = (*plan.steps, plan.refill or plan.steps[0])
            executable = self._prepare(buffer_set, [(Dispatch(step, 1),) for step in steps])
            buffer_set.load(plan, batch.row_labels, batch.context, scale=1.0)
        except BaseException:
            self.release(buffer_set)
            raise
        return ForwardTrajectory(buffer_set, executable[: len(plan)], executable[-1])

    def release(self, buffer_set: BufferSet) -> None:
        """Take a buffer set back; the next trajectory that fits gets it, with its graphs."""
        with self._lock:
            self._leases.take_back(buffer_set)

    def let_go(self) -> None:
        """Free the memory, and the graphs, of all that no trajectory holds."""
        with self._lock:
            self._leases.let_go()

    @property
    def operations(self) -> ops.Operations:
        """The fused operations that it runs: those it was given, or those that were selected."""
        return self._operations or self._selected.operations

    def _lease(self, plan: Plan, batch: Batch, tail: Tail) -> BufferSet:
        denoiser = self.denoiser.for_shape(batch.latents, batch.context)
        with self._lock:
            rows = len(batch.row_labels)
            spec = BufferSpec(
                tail=tail,
                samples=batch.samples,
                copies=rows // batch.samples,
                guided_channels=batch.guided_channels,
                conditions=room_for(count_distinct(denoiser.conditions(batch.row_labels)), rows),
                steps=len(plan),
                memory=plan.memory,
                flags=Flags.now(batch.row_labels.device),
                latents=batch.latents,
                context=tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in batch.context),
                float8=self.options.fp8,
            )
            cache_bytes = FeatureCache.bytes_for(denoiser.shape, spec.memory, spec.rows, denoiser.weight().dtype)
            buffer_set = self._leases.lend(spec, cache_bytes, partial(self._new_buffer_set, spec, denoiser))
            buffer_set.streams.join()
            self.counts.trajectories += 1
            return buffer_set

    def _follow_the_weights(self) -> None:
        """Forget whatever was captured of weights that lie elsewhere by now, or of modules that were replaced."""
        with self._lock:
            made_of = self._watch.look()
            if made_of.parts != self._made_of.parts:
                self._see()
                self._leases.forget()
            self._made_of = made_of

    def _see(self) -> None:
        self.denoiser = self._make_denoiser(self.model)
        self.options.check(self.denoiser)
        weight = self.denoiser.weight()
        selected = ops.select(weight.device, weight.dtype, pdl=self.options.pdl)
        self._selected = Fallback(selected, strict=self.options.strict)
        embed_head = () if self.denoiser.has_plain_embed_head else OF_EMBED_HEAD
        self._runs_otherwise = dict.fromkeys(embed_head, "the model's own layers") | {
            "scaled_linear": self._in_float8()
        }

    def _in_float8(self) -> str:
        """Account of the products that run in float8, in a few words."""
        if not self.options.fp8:
            return "nothing: fp8=False"
        executable, shape = len(ready_sites(self.model)), self.denoiser.shape
        return f"float8, in {executable} of {len(shape.sites)} branches"

    def _new_buffer_set(self, spec: BufferSpec, denoiser: Denoiser) -> BufferSet:
        device = denoiser.weight().device
        graphs, why = self._make_graphs(device), f"no CUDA graphs on a {device.type} device"
        if graphs is not None and (python := self._python_in_the_way(spec)) is not None:
            if self.options.strict:
                raise CaptureError(f"no step can be a CUDA graph: {python}; do without, or pass strict=False")
            graphs, why = None, python
        with torch.inference_mode(mode=False):  # else only that mode could write to its memory
            return BufferSet(spec, self.model, denoiser, self.operations, graphs, why, self.counts)

    def _python_in_the_way(self, spec: BufferSpec) -> str | None:
        """Reason to run eagerly, in a few words: Python that a graph would leave out, or keep as it was; or None."""
        if self._made_of.watched:
            return "the model's layers have hooks"
        if spec.flags.autocast:
            return "autocast"
        foreign = self.denoiser.foreign_layer()
        return None if foreign is None else f"{foreign} is no layer of torch's own"

    def _prepare(self, buffer_set: BufferSet, batches: Sequence[Dispatches]) -> list[Executable]:
        with self._lock:
            room = self._leases.room_for_graphs(len(set(batches)) - buffer_set.graphs)
        return buffer_set.prepare(batches, room, strict=self.options.strict)
