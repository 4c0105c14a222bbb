"""Runs programs: a table from the name of a launch to what it launches, over static memory alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ebcache_fast.engine.cache import FeatureCache
from ebcache_fast.engine.clock import StepClock
from ebcache_fast.engine.embed_head import EmbedHead, Pending, embed_head_of
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.models.base import BranchResources, Denoiser
from ebcache_fast.models.float8 import FLOAT8, Float8Branches
from ebcache_fast.ops.operands import GuidanceArgs, Norm, Quantised, StepIndex, Update
from ebcache_fast.ops.operations import Operations
from ebcache_fast.plan import LONGEST_RUN, Launch, Program, Slot, Term
from ebcache_fast.plan import program as names


@dataclass
class _Step:
    """A program being run: what its launches hand on to each other."""

    x: Tensor  # (B, C, H, W)
    cache: FeatureCache
    steps: int
    head: Callable[[Tensor, Pending, StepIndex], None]
    run: Callable[[Tensor, StepIndex], None]
    u: Tensor  # the input of the branch that comes next, the stream where that takes it as it is
    quantised: Quantised | None = None  # the same in float8, where it takes it so


class Runner:
    """Runs programs of one batch, over any cache of their memory.

    ``clock`` says which step it is, and moves on with each program. Branches write their ungated output into slots, and
    terms read it there, with the gates of the step at hand. What ``float8`` takes of them runs there.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operations: Operations,
        modulation: ModulationTable,
        guide: GuidanceArgs,
        workspace: Workspace,
        per_run: Workspace,
        float8: Float8Branches | None = None,
    ) -> None:
        self._denoiser, self._operations = denoiser, operations
        self._modulation, self._guide, self._workspace = modulation, guide, workspace
        self._per_run, self._res = per_run, BranchResources(operations, workspace, per_run)
        self._float8, self._sites = float8, denoiser.shape.sites
        self._normed = [shape.is_normed for shape in denoiser.shape.site_shapes]
        self.clock = StepClock(modulation.row_of)
        # To the fused operations a row is what has one condition: a single token where the text among them has its own.
        tokens = 1 if denoiser.text_tokens else denoiser.shape.tokens
        self._stream_shape = len(modulation.row_of), tokens, denoiser.shape.width
        self._rows = len(modulation.row_of) * tokens // denoiser.shape.tokens  # of the batch
        self._table: dict[str, Callable[[Launch, _Step, StepIndex], None]] = {
            names.EMBED: self._embed,
            names.EMBED_NORM: self._embed_norm,
            names.RESIDUAL: self._residual,
            names.RESIDUAL_NORM: self._residual_norm,
            names.RESIDUAL_QUANTISE: self._residual_quantise,
            names.BRANCH: self._branch,
            names.SUM: self._sum,
            names.SUMS: self._make_sums,
            names.HEAD: self._head,
            names.RUN: self._run_steps,
            names.SELECT: self._select,
            names.GATHER: self._gather,
            names.SCATTER: self._scatter,
            names.COPY: self._copy,
            names.SUBTRACT: self._subtract,
        }

    def predict(self, program: Program, x: Tensor, cache: FeatureCache, out: Tensor) -> None:
        """Run a step to its guided, scaled output: latents x (B, C, H, W) -> out (R, Cout, H, W), in x's dtype."""

        def head(h: Tensor, pending: Pending, at: StepIndex) -> None:
            self._embed_head.predict(h, pending, self._head_norm(), at, self._guide, out)

        self._launch_all(program, _Step(x, cache, program.steps, head, _never, self._buffer("h")))

    def update(self, program: Program, x: Tensor, cache: FeatureCache, update: Update) -> None:
        """Run all steps of a program, the sampler's included, on x (B, C, H, W) in place."""

        def head(h: Tensor, pending: Pending, at: StepIndex) -> None:
            self._embed_head.update(x, h, pending, self._head_norm(), at, self._guide, update)

        def run(sums: Tensor, at: StepIndex) -> None:
            self._embed_head.run_update(x, sums, self._head_norm(), at, self._guide, update)

        self._launch_all(program, _Step(x, cache, program.steps, head, run, self._buffer("h")))

    def _launch_all(self, program: Program, step: _Step) -> None:
        """Launch after launch; the first that reads the step takes it over, the last hands it on."""
        at, then = self.clock.first, self.clock.here
        for launch in program.launches[:-1]:
            self._table[launch.name](launch, step, at)
            if launch.name not in names.WITHOUT_STEP:
                at = then
        last = program.launches[-1]
        self._table[last.name](last, step, self.clock.last(program.steps))

    def _embed(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        self._embed_head.embed(step.x, self._buffer("h"))

    def _embed_norm(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        h, step.u, step.quantised = self._buffer("h"), self._buffer("u"), None
        self._embed_head.embed_norm_modulate(step.x, self._norm(launch), at, h, step.u)

    def _residual(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        pending = self._pending(launch.terms, step)
        self._operations.gated_residual(self._buffer("h"), pending.branches, pending.gates, at)

    def _residual_norm(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        step.u, step.quantised = self._buffer("u"), None
        h, pending = self._buffer("h"), self._pending(launch.terms, step)
        branches, gates = pending.branches, pending.gates
        self._operations.gated_residual_norm_modulate(h, branches, gates, self._norm(launch), at, step.u)

    def _residual_quantise(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        if self._float8_of(launch) is None:  # its layer is not as plain as it was
            self._residual_norm(launch, step, at)
            return
        h, pending = self._buffer("h"), self._pending(launch.terms, step)
        values = self._workspace.buffer("u", *h.shape, dtype=FLOAT8)
        step.quantised = u = Quantised(values, self._workspace.buffer("scales of u", *h.shape[:2], dtype=torch.float32))
        branches, gates = pending.branches, pending.gates
        self._operations.gated_residual_norm_quantise(h, branches, gates, self._norm(launch), at, u)

    def _branch(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        site, res = self._sites[launch.site], self._res
        if launch.tokens:
            self._denoiser.branch(site, *self._of_tokens(launch), res)
            return
        out = self._value(launch.out, step)
        if launch.window:
            res = res._replace(window=launch.window)
        if step.quantised is not None and self._float8 is not None:
            self._float8.run(site, step.quantised, out, res)
        elif launch.is_shared:
            conditional, unconditional = torch.unflatten(out, 0, (2, -1)).unbind()
            self._denoiser.branch(site, step.u.view(out.shape)[: len(conditional)], conditional, res)
            self._operations.copy(conditional, unconditional)
        else:
            u = step.u if self._normed[launch.site] else self._buffer("h")
            self._denoiser.branch(site, u.view(out.shape), out, res)

    def _select(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        (source,) = launch.sources
        values = self._value(source, step)
        rows, tokens, _ = values.shape
        scores = self._workspace.buffer("scores", rows, tokens)
        torch.linalg.vector_norm(values, dim=2, out=scores)
        self._operations.select_tokens(scores, launch.tokens, self._indices(launch, rows))

    def _gather(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        u, _ = self._of_tokens(launch)
        self._operations.gather_tokens(step.u.view(len(u), -1, u.shape[2]), self._indices(launch, len(u)), u)

    def _scatter(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        _, out = self._of_tokens(launch)
        self._operations.scatter_tokens(out, self._indices(launch, len(out)), self._value(launch.out, step))

    def _copy(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        (source,) = launch.sources
        self._operations.copy(self._value(source, step), self._value(launch.out, step))

    def _subtract(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        minuend, subtrahend = (self._value(source, step) for source in launch.sources)
        self._operations.subtract(minuend, subtrahend, self._value(launch.out, step))

    def _value(self, slot: Slot | None, step: _Step) -> Tensor:
        """The memory of a slot (R, T, D), or of the stream."""
        if slot is None:
            return self._buffer("h").view(step.cache.shape)
        if slot.meaning in names.WITHIN_A_STEP:
            return self._workspace.buffer(f"{slot.meaning} {slot.first} {slot.last}", *step.cache.shape)
        return step.cache.slot(slot)

    def _indices(self, launch: Launch, rows: int) -> Tensor:
        return self._workspace.buffer("indices", rows, launch.tokens, dtype=torch.int32)

    def _of_tokens(self, launch: Launch) -> tuple[Tensor, Tensor]:
        """Input and output of a branch over the selected tokens, (R, k, D) each."""
        *_, width = self._stream_shape
        shape = self._rows, launch.tokens, width
        return self._workspace.buffer("u of tokens", *shape), self._workspace.buffer("output of tokens", *shape)

    def _sum(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        h = self._buffer("h")
        self._gated_sum(launch, step.cache, at, h, h.unsqueeze(0))

    def _make_sums(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        self._gated_sum(launch, step.cache, at, None, self._sums(step.steps))

    def _head(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        step.head(self._buffer("h"), self._pending(launch.terms, step), at)

    def _run_steps(self, launch: Launch, step: _Step, at: StepIndex) -> None:
        step.run(self._sums(step.steps), at)

    def _gated_sum(self, launch: Launch, cache: FeatureCache, at: StepIndex, base: Tensor | None, sums: Tensor) -> None:
        """Add the terms of neighbouring slots in one launch."""
        first, count = launch.terms[0], len(launch.terms)
        slots = cache.slots(first.slot, count).view(count, *self._stream_shape)
        self._operations.gated_sum(slots, self._modulation.gates(cache.column_of(first), count), at, base, sums)

    def _pending(self, terms: tuple[Term, ...], step: _Step) -> Pending:
        slots = [self._value(term.slot, step).view(self._stream_shape) for term in terms]
        return Pending(slots, [self._modulation.gate(step.cache.column_of(term)) for term in terms])

    def _norm(self, launch: Launch) -> Norm:
        return self._modulation.norm(launch.site, cast(nn.LayerNorm, self._denoiser.norm(self._sites[launch.site])))

    def _float8_of(self, launch: Launch) -> Float8Branches | None:
        """The branches in float8, if they run this site's; else None."""
        return self._float8 if self._float8 is not None and self._float8.takes(self._sites[launch.site]) else None

    @property
    def _embed_head(self) -> EmbedHead:
        return embed_head_of(self._denoiser, self._operations, self._per_run)

    def _head_norm(self) -> Norm:
        return self._modulation.head_norm(self._denoiser.head_norm)

    def _buffer(self, name: str) -> Tensor:
        return self._workspace.buffer(name, *self._stream_shape)

    def _sums(self, steps: int) -> Tensor:
        return self._workspace.buffer("sums", LONGEST_RUN, *self._stream_shape)[:steps]


def _never(sums: Tensor, at: StepIndex) -> None:
    """Do nothing: a step whose output is wanted makes no sums of several steps."""
