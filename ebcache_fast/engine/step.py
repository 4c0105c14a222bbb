"""The denoising steps of one batch: which branches run, what is read from the cache, in which order it is summed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ebcache_fast.engine.ends import Ends, Pending, ends_of
from ebcache_fast.engine.feature_cache import FeatureCache
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.step_clock import StepClock
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.models.denoiser import Denoiser, Means
from ebcache_fast.models.float8 import FLOAT8, Float8Branches
from ebcache_fast.operands import At, Guide, Norm, Quantised, Update
from ebcache_fast.ops import Operations
from ebcache_fast.plan import Slot, StepPlan

MAX_PENDING = 2  # branches that one fused operation adds
LONGEST_RUN = 3  # ATTN_MLP steps of which one pass over the cache makes the sums


class StepRunner:
    """Runs steps of one batch under any StepPlan, over any cache of its size, on static memory alone.

    ``clock`` says which step it is, and moves on with each. Computed branches write their ungated output into their
    slots; reused ones are read from theirs. Gates, of the step at hand always, are applied when a branch is added.
    What ``float8`` takes of them runs there.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operations: Operations,
        modulation: ModulationTable,
        guide: Guide,
        workspace: Workspace,
        constants: Workspace,
        float8: Float8Branches | None = None,
    ) -> None:
        self._denoiser, self._operations = denoiser, operations
        self._modulation, self._guide, self._workspace = modulation, guide, workspace
        self._constants, self._means = constants, Means(operations, workspace, constants)
        self._float8 = float8
        self.clock = StepClock(modulation.row_of.device)
        # To the fused operations a row is what has one condition: a single token where the text among them has its own.
        tokens = 1 if denoiser.text_tokens else denoiser.shape.tokens
        self._stream_shape = len(modulation.row_of), tokens, denoiser.shape.width

    def predict(self, x: Tensor, plan: StepPlan, cache: FeatureCache, out: Tensor) -> None:
        """Guided and scaled output for latents x (B, C, H, W) -> out (R, Cout, H, W), in x's dtype."""
        reads = self._reads()
        if plan.computes_nothing:
            h, sums = self._buffer("h"), self._sums(1)
            self._ends.embed(x, h)
            self._operations.gated_sum(self._every_slot(cache), self._modulation.gates(), next(reads), h, sums)
            h, pending = sums[0], Pending()
        else:
            h, pending = self._run_branches(x, plan, cache, reads)
        self._ends.predict(h, pending, self._head_norm(), self._last(), self._guide, out)

    def update(self, x: Tensor, plan: StepPlan, cache: FeatureCache, update: Update) -> None:
        """A whole step that computes some branch, the sampler's included, on x (B, C, H, W) in place."""
        h, pending = self._run_branches(x, plan, cache, self._reads())
        self._ends.update(x, h, pending, self._head_norm(), self._last(), self._guide, update)

    def run_update(self, x: Tensor, steps: int, cache: FeatureCache, update: Update) -> None:
        """``steps`` whole steps, none of which computes a branch, on x (B, C, H, W) in place.

        Their sums over the cache do not depend on x: one pass makes them all.
        """
        sums = self._sums(steps)
        self._operations.gated_sum(self._every_slot(cache), self._modulation.gates(), next(self._reads()), None, sums)
        self._ends.run_update(x, sums, self._head_norm(), self._last(steps), self._guide, update)

    def _run_branches(
        self, x: Tensor, plan: StepPlan, cache: FeatureCache, reads: Iterator[At]
    ) -> tuple[Tensor, Pending]:
        """All layers; the residual stream h, and what the step's end still has to add to it.

        Branches are pending until the next one that computes needs the stream.
        """
        computed = frozenset(plan.computed)
        h = self._buffer("h")
        started, pending = False, Pending()  # started: h holds the tokens
        for layer in range(plan.depth):
            for b, branch in enumerate(plan.branches):
                slot = cache.slot(layer, branch)
                if (layer, branch) in computed:
                    layer_norm = self._denoiser.norm(layer, branch)
                    norm = None if layer_norm is None else self._modulation.norm(layer, b, layer_norm)
                    float8 = self._float8_for((layer, branch))
                    if not started and (pending.branches or norm is None or float8 is not None):
                        self._ends.embed(x, h)
                    if float8 is not None and norm is not None:
                        quantised = self._quantised_input_of_branch(h, pending, norm, reads)
                        float8.run((layer, branch), quantised, slot, self._means)
                    else:
                        u = self._input_of_branch(x, h, pending, norm, reads)
                        self._denoiser.run_branch(layer, branch, u.view(slot.shape), slot, self._means)
                    started, pending = True, Pending()
                pending.branches.append(slot.view(h.shape))
                pending.gates.append(self._modulation.gate(layer, b))
        return h, self._add_all_but_the_last(h, pending, reads)

    def _input_of_branch(
        self, x: Tensor, h: Tensor, pending: Pending, norm: Norm | None, reads: Iterator[At]
    ) -> Tensor:
        """Bring the stream up to date, of which the tokens are there if anything is pending, and normalize it."""
        if norm is None:
            last = self._add_all_but_the_last(h, pending, reads)
            if last.branches:
                self._operations.gated_residual(h, last.branches, last.gates, next(reads))
            return h
        u = self._buffer("u")
        if not pending.branches:
            self._ends.embed_norm_modulate(x, norm, next(reads), h, u)
        else:
            last = self._add_all_but_the_last(h, pending, reads)
            self._operations.gated_residual_norm_modulate(h, last.branches, last.gates, norm, next(reads), u)
        return u

    def _float8_for(self, slot: Slot) -> Float8Branches | None:
        """What runs the branch in float8, if it is to."""
        return self._float8 if self._float8 is not None and self._float8.takes(slot) else None

    def _quantised_input_of_branch(self, h: Tensor, pending: Pending, norm: Norm, reads: Iterator[At]) -> Quantised:
        """Bring the stream up to date, in which the tokens are already, and normalize it into float8."""
        values = self._workspace.buffer("u", *h.shape, dtype=FLOAT8)
        u = Quantised(values, self._workspace.buffer("scales of u", *h.shape[:2], dtype=torch.float32))
        last = self._add_all_but_the_last(h, pending, reads)
        self._operations.gated_residual_norm_quantise(h, last.branches, last.gates, norm, next(reads), u)
        return u

    def _add_all_but_the_last(self, h: Tensor, pending: Pending, reads: Iterator[At]) -> Pending:
        """Add branches to h until one operation can take what remains; returns that."""
        branches, gates = pending.branches, pending.gates
        while len(branches) > MAX_PENDING:
            self._operations.gated_residual(h, branches[:MAX_PENDING], gates[:MAX_PENDING], next(reads))
            branches, gates = branches[MAX_PENDING:], gates[MAX_PENDING:]
        return Pending(branches, gates)

    @property
    def _ends(self) -> Ends:
        return ends_of(self._denoiser, self._operations, self._constants)

    def _reads(self) -> Iterator[At]:
        return self.clock.reads(self._modulation.row_of)

    def _last(self, steps: int = 1) -> At:
        return self.clock.last(self._modulation.row_of, steps)

    def _head_norm(self) -> Norm:
        return self._modulation.head_norm(self._denoiser.head_norm)

    def _every_slot(self, cache: FeatureCache) -> Tensor:
        slots = cache.every_slot()
        return slots.view(len(slots), *self._stream_shape)

    def _buffer(self, name: str) -> Tensor:
        return self._workspace.buffer(name, *self._stream_shape)

    def _sums(self, steps: int) -> Tensor:
        return self._workspace.buffer("sums", LONGEST_RUN, *self._stream_shape)[:steps]
