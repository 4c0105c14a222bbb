"""The denoising steps of one batch: which branches run, what is read from the cache, in which order it is summed."""

from collections.abc import Sequence

from torch import Tensor

from ebcache_fast.engine.ends import Ends, Pending, ends_of
from ebcache_fast.engine.feature_cache import FeatureCache
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.models.denoiser import Denoiser
from ebcache_fast.operands import Guide, Norm, Update
from ebcache_fast.ops import Operations
from ebcache_fast.plan import StepPlan

MAX_PENDING = 2  # branches that one fused operation adds
LONGEST_RUN = 3  # ATTN_MLP steps of which one pass over the cache makes the sums


class StepRunner:
    """Runs steps of one batch under any StepPlan, over any cache of its size.

    Steps are numbered as in the modulation table. Computed branches write their ungated output into their slots;
    reused ones are read from theirs. Gates, of the step at hand always, are applied when a branch is added.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operations: Operations,
        modulation: ModulationTable,
        guide: Guide,
        workspace: Workspace,
        rows: int,
    ) -> None:
        self._denoiser, self._operations = denoiser, operations
        self._modulation, self._guide, self._workspace = modulation, guide, workspace
        self._stream_shape = rows, denoiser.shape.tokens, denoiser.shape.width

    def predict(self, x: Tensor, plan: StepPlan, i: int, cache: FeatureCache, out: Tensor) -> None:
        """Guided and scaled output for latents x (B, C, H, W) -> out (R, Cout, H, W), in x's dtype."""
        at = self._modulation.at(i)
        if plan.computes_nothing:
            h, (total,) = self._buffer("h"), self._sums(1)
            self._ends.embed(x, h)
            self._operations.gated_sum(cache.stacked(plan.reused), self._modulation.gates(), at, h, total[None])
            h, pending = total, Pending()
        else:
            h, pending = self._run_branches(x, plan, i, cache)
        self._ends.predict(h, pending, self._head_norm(), at, self._guide, out)

    def update(self, x: Tensor, plan: StepPlan, i: int, cache: FeatureCache, update: Update) -> None:
        """A whole step that computes some branch, the sampler's included, on x (B, C, H, W) in place."""
        h, pending = self._run_branches(x, plan, i, cache)
        at, norm = self._modulation.at(i), self._head_norm()
        self._ends.update(x, h, pending, norm, at, self._guide, update)

    def run_update(self, x: Tensor, plan: StepPlan, i: int, steps: int, cache: FeatureCache, update: Update) -> None:
        """``steps`` whole steps from ``i`` on, none of which computes a branch, on x (B, C, H, W) in place.

        Their sums over the cache do not depend on x: one pass makes them all.
        """
        at = self._modulation.at(i)
        sums = self._sums(steps)
        self._operations.gated_sum(cache.stacked(plan.reused), self._modulation.gates(), at, None, sums)
        self._ends.run_update(x, sums, self._head_norm(), at, self._guide, update)

    def _run_branches(self, x: Tensor, plan: StepPlan, i: int, cache: FeatureCache) -> tuple[Tensor, Pending]:
        """All layers; the residual stream h (R, T, D), and what the step's end still has to add to it.

        Branches are pending until the next one that computes needs the stream.
        """
        at, computed = self._modulation.at(i), frozenset(plan.computed)
        h, u = self._buffer("h"), self._buffer("u")
        started, pending = False, Pending()  # started: h holds the tokens
        for layer in range(plan.depth):
            for b, branch in enumerate(plan.branches):
                slot = cache.slot(layer, branch)
                if (layer, branch) in computed:
                    norm = self._modulation.norm(layer, b, self._denoiser.norm_eps(layer, branch))
                    if not started and not pending.branches:
                        self._ends.embed_norm_modulate(x, norm, at, h, u)
                    else:
                        if not started:
                            self._ends.embed(x, h)
                        last = self._add_all_but_the_last(h, pending, i)
                        self._operations.gated_residual_norm_modulate(h, last.branches, last.gates, norm, at, u)
                    started, pending = True, Pending()
                    self._denoiser.run_branch(layer, branch, u, slot, self._operations, self._workspace)
                pending.branches.append(slot)
                pending.gates.append(self._modulation.gate(layer, b))
        return h, self._add_all_but_the_last(h, pending, i)

    def _add_all_but_the_last(self, h: Tensor, pending: Pending, i: int) -> Pending:
        """Add branches to h until one operation can take what remains; returns that."""
        branches, gates = pending.branches, pending.gates
        while len(branches) > MAX_PENDING:
            self._operations.gated_residual(h, branches[:MAX_PENDING], gates[:MAX_PENDING], self._modulation.at(i))
            branches, gates = branches[MAX_PENDING:], gates[MAX_PENDING:]
        return Pending(branches, gates)

    @property
    def _ends(self) -> Ends:
        return ends_of(self._denoiser, self._operations)

    def _head_norm(self) -> Norm:
        return self._modulation.head_norm(self._denoiser.head_eps)

    def _buffer(self, name: str) -> Tensor:
        return self._workspace.buffer(name, *self._stream_shape)

    def _sums(self, steps: int) -> Tensor:
        return self._workspace.buffer("sums", LONGEST_RUN, *self._stream_shape)[:steps]


def runs(plans: Sequence[StepPlan]) -> list[tuple[int, int]]:
    """Steps as (first, how many) to run at once: those that compute nothing in runs of up to `LONGEST_RUN`."""
    found: list[tuple[int, int]] = []
    for i, plan in enumerate(plans):
        first, count = found[-1] if found else (0, LONGEST_RUN)
        if plan.computes_nothing and plans[first].computes_nothing and count < LONGEST_RUN:
            found[-1] = first, count + 1
        else:
            found.append((i, 1))
    return found
