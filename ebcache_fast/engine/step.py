"""One denoising step: which branches run, what is read from the cache, and in which order it is summed."""

from torch import Tensor

from ebcache_fast import ops
from ebcache_fast.engine.feature_cache import FeatureCache
from ebcache_fast.engine.modulation import StepModulation
from ebcache_fast.models.denoiser import Denoiser
from ebcache_fast.plan import StepPlan


def run_step(denoiser: Denoiser, x: Tensor, plan: StepPlan, modulation: StepModulation, cache: FeatureCache) -> Tensor:
    """The model's output for latents x (N, C, H, W) under one StepPlan -> (rows, out channels, H, W).

    Computed branches write their ungated output into their slots; reused ones are read from theirs. Gates,
    of this step always, are applied when a branch is added. Branches are pending until the next one that
    computes needs the residual stream; if none does, the whole step is one sum over the cache. Where the
    modulation has a multiple of N rows, as under guidance, all rows of a sample start from its one latent.
    """
    shift, scale = modulation.head
    h = denoiser.embed(x).repeat(shift.shape[0] // x.shape[0], 1, 1)  # (rows, T, D)
    if plan.computes_nothing:
        gates = modulation.layers[:, :, 2].flatten(0, 1)  # (K, N, D)
        h = ops.gated_sum(h, cache.stacked(plan.reused), gates)
        return denoiser.head(h, shift, scale)

    pending: list[Tensor] = []  # (N, T, D) each
    pending_gates: list[Tensor] = []  # (N, D) each
    computed = frozenset(plan.computed)
    for layer in range(plan.depth):
        for b, branch in enumerate(plan.branches):
            shift_b, scale_b, gate = modulation.layers[layer, b]  # (N, D) each
            slot = cache.slot(layer, branch)
            if (layer, branch) in computed:
                h, u = ops.gated_residual_norm_modulate(
                    h, pending, pending_gates, shift_b, scale_b, denoiser.norm_eps(layer, branch)
                )
                pending, pending_gates = [], []
                denoiser.run_branch(layer, branch, u, slot)
            pending.append(slot)
            pending_gates.append(gate)
    return denoiser.head(ops.gated_residual(h, pending, pending_gates), shift, scale)
